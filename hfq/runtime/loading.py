"""`hfq.load`: an int8 checkpoint with int8 kernels, the class chosen by its task."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..source import pull
from ..tasks import TASKS, find_task
from .modules import Int8Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    task: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel":
    """Load an int8 checkpoint, by Hub id or folder. Further arguments go to `from_pretrained`.

    Example:
        >>> model = hfq.load("me/bert-mrpc-int8")
        >>> model(**tokenizer("a", "b", return_tensors="pt")).logits

    Raises:
        SourceError: the checkpoint cannot be pulled or read.
        UnsupportedError: it is not an int8 checkpoint, so there is nothing to run in int8.
    """
    import transformers

    found = pull(str(checkpoint), revision=revision, token=token, trust_remote_code=trust_remote_code)
    auto_class = getattr(transformers, TASKS[find_task(found.config, task)].auto_class)
    model = auto_class.from_pretrained(found.path, trust_remote_code=trust_remote_code, **kwargs)
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UnsupportedError(
            f"{checkpoint} has no layer that runs in int8 here. Expected a checkpoint made by `hfq quantize`; "
            "load a float one with transformers."
        )
    return model
