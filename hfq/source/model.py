"""What a checked checkpoint holds, loaded: its model and its tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..common.errors import DataError, HfqError, SourceError
from .bounds import bounded
from .checkpoint import Checkpoint

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_POOLER = "pooler."


def load_model(checkpoint: Checkpoint, auto_class: str, *, trust_remote_code: bool) -> nn.Module:
    """A float checkpoint in float32, an int8 one with int8 kernels.

    Raises:
        SourceError: its files are not what its config says.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with bounded(checkpoint):
            model, info = getattr(transformers, auto_class).from_pretrained(
                checkpoint.path,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all in one message
            )
    except HfqError:
        raise
    except Exception as error:  # transformers raises many types for one cause: these files are not that model
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(f"transformers cannot load {checkpoint.info.id} as {auto_class}: {message}") from error
    if misfits := sorted(info["mismatched_keys"]):
        shapes = [f"{name} is {list(there)} and not {list(expected)}" for name, there, expected in misfits]
        raise SourceError(
            f"The weights of {checkpoint.info.id} do not fit its config.json: {_few(shapes)}. "
            "Take both files from the same checkpoint."
        )
    missing = sorted(info["missing_keys"])
    if auto_class == "AutoModel" and missing and all(name.startswith(_POOLER) for name in missing):
        model.pooler, missing = None, []  # which nothing reads where an encoder is all that there is
    if missing:
        raise SourceError(
            f"{checkpoint.info.id} lacks weights that {auto_class} needs, which would be random: {_few(missing)}. "
            "Expected a checkpoint that was fine-tuned for this task."
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer, from its folder only.

    Raises:
        DataError: its files are missing or damaged, or it cannot pad.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # tokenizer_config.json may name any class
            raise ValueError(f"it is a {type(tokenizer).__name__}")
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise DataError(
            f"The tokenizer of {checkpoint.info.id} cannot be loaded: {error}. Download it again."
        ) from error
    files = list(tokenizer.vocab_files_names.values())  # without them transformers makes one up; some need none
    if files and not any((checkpoint.path / name).is_file() for name in files):
        raise DataError(
            f"{checkpoint.info.id} has no tokenizer: expected {' or '.join(files)}. "
            "Save it there with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
        )
    if tokenizer.pad_token is None:
        raise DataError(
            f"The tokenizer of {checkpoint.info.id} has no padding token, so examples cannot be batched. "
            "Give it one (`tokenizer.pad_token = …`), and config.json its id as pad_token_id."
        )
    return tokenizer


def load_image_processor(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The checkpoint's image processor, from its folder only.

    Raises:
        DataError: its file is missing or damaged.
    """
    return _load_processor(checkpoint, "AutoImageProcessor", "image processor", trust_remote_code=trust_remote_code)


def load_feature_extractor(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The checkpoint's feature extractor, from its folder only.

    Raises:
        DataError: its file is missing or damaged.
    """
    return _load_processor(checkpoint, "AutoFeatureExtractor", "feature extractor", trust_remote_code=trust_remote_code)


def _load_processor(checkpoint: Checkpoint, auto_class: str, what: str, *, trust_remote_code: bool) -> Any:
    import transformers

    if not any((checkpoint.path / name).is_file() for name in PROCESSOR_FILES):
        raise DataError(
            f"{checkpoint.info.id} has no {PROCESSOR_FILES[0]}, which says how its inputs are scaled. Save it there with "
            f"`{auto_class}.from_pretrained(…).save_pretrained(…)`."
        )
    try:
        return getattr(transformers, auto_class).from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a broken file
        raise DataError(
            f"The {what} of {checkpoint.info.id} cannot be loaded: {error}. Download its {PROCESSOR_FILES[0]} again."
        ) from error


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
