"""What a checkpoint's files may ask for, checked before a library acts on it: no code, no other repository, no terabytes.

Nothing is loaded here. What is allowed when somebody passes --trust-remote-code is said by `remote_code`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ..common.errors import SourceError, WrongCheckpointError
from ..common.reading import LARGE, SMALL, megabytes, read_json, walk

ADAPTER = "adapter_config.json"
_TEXT = (".json", ".txt", ".model", ".jinja", ".py", ".md")
_READ_HERE = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "hfq.json")
_READ_BY_LIBRARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "vocab.txt", "merges.txt", "tokenizer.model")
LIMITS = {**dict.fromkeys(_READ_HERE, SMALL), **dict.fromkeys(_READ_BY_LIBRARIES, LARGE)}
_LONGEST_NAME = 255  # bytes, of a file on Linux
_LARGEST = 1 << 24  # of what says how large a model is, where no tensor is as long
_IS_SIZE = re.compile(
    r"(^|_)(size|dims?|layers?|heads?|labels?|length|positions?|embeddings?|experts?|groups?|depths?|channels?|width|"
    r"blocks?|buckets|vocab|n|num|d|hidden|inner|intermediate|ffn|window|states?)(_|$)"
)
_IMPLEMENTATION = re.compile(r"_implementation(_internal)?$")
_COSTLY = re.compile(r"\)[*+{?]|([*+}].*){5}")  # where a pattern of layer names could try for ever
_LONGEST_PATTERN = 200


class _Group(BaseModel):
    targets: list[str]
    format: str | None = None


class _Quantization(BaseModel):
    quant_method: str | None = None
    ignore: list[str] | None = None
    config_groups: dict[str, _Group | list[str]] | None = None
    hfq_input_ranges: dict[str, tuple[float, int]] | None = None


class _Config(BaseModel):
    """The keys of config.json that hfq itself reads, and what they must be."""

    architectures: list[str] | None = Field(None, max_length=16)
    auto_map: dict[str, str | list[str | None] | None] | None = None
    hfq_module: str | None = None
    id2label: dict[int, Any] | None = None
    max_position_embeddings: int | None = Field(None, strict=True)
    model_type: str | None = None
    num_labels: int | None = Field(None, strict=True)
    pad_token_id: int | None = Field(None, strict=True)
    problem_type: str | None = None
    quantization_config: _Quantization | None = None
    vocab_size: int | None = Field(None, strict=True)


def read_config(folder: Path, *, reference: str) -> dict[str, Any]:
    """config.json of a checkpoint, of the types that are expected.

    Raises:
        SourceError: it is missing, damaged, or no transformers config.
    """
    file = folder / "config.json"
    try:
        config = read_json(file)
    except FileNotFoundError as error:
        raise WrongCheckpointError(
            f"{reference} has no config.json. Expected a transformers checkpoint: config.json and safetensors weights."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds a {type(config).__name__}; expected an object. Download it again.")
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        row = error.errors()[0]
        raise SourceError(
            f"{file} is no transformers config: {'.'.join(map(str, row['loc']))[:80]}: {row['msg']}. Download it again."
        ) from error
    return config


def check_config(config: Mapping[str, Any], *, longest: int, reference: str) -> None:
    """Refuse a config that asks for other people's code or for more than its weights hold.

    `longest`: the largest dimension of any tensor of the checkpoint.

    Raises:
        SourceError: naming the key.
    """
    for key, value in walk(dict(config)):
        if _IMPLEMENTATION.search(key) and isinstance(value, str) and re.search("[/:]", value):
            raise SourceError(
                f"config.json of {reference} names {value!r} as {key}: code from a repository on the Hub that is not "
                "the checkpoint's. hfq runs none such; take the key out of config.json."
            )
        if type(value) is int and _IS_SIZE.search(key):
            most = max(longest, 1 << 16) if key == "num_labels" else max(longest, _LARGEST)
            if abs(value) > most:
                raise SourceError(
                    f"config.json of {reference} asks for {key} {value}, and no tensor of its weights is longer than "
                    f"{longest}. Take both files from the same checkpoint."
                )
    _check_quantization(config.get("quantization_config") or {}, reference)


def remote_code(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The classes that a checkpoint brings code for, by the `auto_map` of its config and of its tokenizer's.

    Raises:
        SourceError: tokenizer_config.json cannot be read.
    """
    maps = [config.get("auto_map")]
    file = folder / "tokenizer_config.json"
    if file.is_file():
        try:
            tokenizer = read_json(file)
        except (OSError, ValueError) as error:
            raise SourceError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
        maps.append(tokenizer.get("auto_map") if isinstance(tokenizer, dict) else None)
    found = set()
    for classes in maps:
        if isinstance(classes, dict):
            found |= {_origin(str(name), classes[name]) for name in classes}
        elif classes:
            found.add(_origin("AutoTokenizer", classes))  # how it was written once
    return sorted(found)


def check_files(folder: Path, *, reference: str) -> None:
    """Refuse a folder whose files lead elsewhere or are larger than what they are for.

    Raises:
        SourceError: naming the file.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    check_links([path for path in files if path.suffix in _TEXT], folder=folder)
    if any(path.name == ADAPTER for path in files):
        raise SourceError(
            f"{reference} is an adapter ({ADAPTER}), whose model is in another repository. Merge the two where you "
            "trust them (`merge_and_unload` of peft), and quantize the result."
        )
    check_sizes({path.name: path.stat().st_size for path in files}, reference)


def check_sizes(sizes: Mapping[str, int | None], reference: str) -> None:
    """Refuse files that are far larger than any honest one of their name.

    Raises:
        SourceError: naming the file.
    """
    for name, size in sizes.items():
        if size is not None and size > LIMITS.get(name, size):
            raise SourceError(
                f"{name} of {reference} is larger than {megabytes(LIMITS[name])}, and no such file needs that. "
                "Expected a transformers checkpoint."
            )


def check_links(files: Iterable[Path], *, folder: Path) -> None:
    """Refuse files that lie elsewhere than in `folder`, by way of links: their content would be copied, and published.

    Weights may, for nothing else passes for them; so may a snapshot in the cache of the Hub's client, whose files are
    links to the blobs beside it.

    Raises:
        SourceError: naming the link.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in files:
        target = path.resolve()
        if path.suffix != ".safetensors" and not any(target.is_relative_to(inside) for inside in homes):
            raise SourceError(
                f"{path} is a link out of its folder, to {target}. Put the file itself there, if that is what you mean."
            )


def check_names(names: Iterable[str], reference: str) -> None:
    """Refuse a repository with a file whose name leads out of a folder, or that no folder can hold.

    Raises:
        SourceError: naming the file.
    """
    for name in names:
        parts = name.split("/")
        escapes = name.startswith("/") or "\\" in name or bool(re.match("[A-Za-z]:", name)) or ".." in parts
        if escapes or "" in parts or not name.isprintable() or any(len(p.encode()) > _LONGEST_NAME for p in parts):
            raise SourceError(
                f"{reference} lists a file called {name[:200]!r}, which cannot be a file of a folder here. Nothing of "
                "it was downloaded; ask its owner."
            )


def _check_quantization(settings: Mapping[str, Any], reference: str) -> None:
    method = settings.get("quant_method")
    if settings and method not in (None, "compressed-tensors"):
        raise WrongCheckpointError(
            f"{reference} is quantized by {method!r}. hfq opens float checkpoints, and int8 ones in the layout of "
            "compressed-tensors; take the float checkpoint that it was made from."
        )
    for _, value in walk(dict(settings)):
        pattern = value[3:] if isinstance(value, str) and value.startswith("re:") else ""
        if len(pattern) > _LONGEST_PATTERN or _COSTLY.search(pattern):
            raise SourceError(
                f"quantization_config of {reference} has the pattern {pattern[:80]!r}, which could take for ever to "
                "compare with a name. Write out the names of the layers."
            )


def _origin(name: str, value: Any) -> str:
    classes = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    repos = sorted({item.split("--")[0] for item in classes if "--" in item})
    return f"{name} from {', '.join(repos)}" if repos else name
