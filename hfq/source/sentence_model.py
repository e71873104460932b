"""What sentence-transformers' files say of a model: its modules, prompts and similarity; and the modules, loaded.

The first module is the transformer, which hfq quantizes. The others make a vector of what it puts out; they are loaded
here by sentence-transformers itself, and stay float.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import SourceError, UnsupportedError
from ..common.names import CARD_FILE
from ..common.reading import read_json, read_text
from .contents import MODULES_FILE, SENTENCE_CONFIG
from .metadata import LONGEST_CARD

if TYPE_CHECKING:
    from torch import nn

CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
TRANSFORMERS = ("Transformer", "MLMTransformer")
POOLING = ("Pooling", "SpladePooling")
HEADS = (*POOLING, "Dense", "Normalize", "LayerNorm", "Dropout")
WITHOUT_FILES = "Normalize"  # git keeps no empty folder
_OF_TRANSFORMER = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_DIMS = ("matryoshka_dims", "matryoshka_dimensions")
_IN_CARD = re.compile(r'"matryoshka_dims": \[([\d\s,]{1,999})\]')
_OWN = "sentence_transformers."
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Module:
    """A line of modules.json: a class of sentence-transformers, by its path and its name, and its folder."""

    type: str
    path: str

    @property
    def name(self) -> str:
        return self.type.rpartition(".")[2]


@dataclass(frozen=True)
class SentenceModel:
    """`kind`: the class of sentence-transformers that opens it. `prompts`: texts put before a text, by name.

    `similarity`: cosine, dot, euclidean or manhattan. `transformer`: the first module's own settings. `dims`: lengths that
    its vectors may be cut to, as its files name them (Matryoshka, Kusupati et al. 2022).
    """

    modules: Sequence[Module]
    kind: str = "SentenceTransformer"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None
    truncate_dim: int | None = None
    dims: Sequence[int] = ()
    transformer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether all of its modules are sentence-transformers' own."""
        return all(module.type.startswith(_OWN) for module in self.modules)

    def has(self, *names: str) -> bool:
        """Whether one of its modules is of a class of such a name."""
        return any(module.name in names for module in self.modules)


def read_sentence_model(folder: Path) -> SentenceModel | None:
    """What the files of a sentence-transformers folder say; None for a folder that is none.

    Raises:
        SourceError: one of them is damaged.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    rows = _read(folder / MODULES_FILE, list)
    try:
        modules = [Module(row["type"], row["path"]) for row in rows]
        if not modules or not all(isinstance(text, str) for module in modules for text in (module.type, module.path)):
            raise TypeError("it names no module")
    except (KeyError, TypeError) as error:
        raise _damaged(folder / MODULES_FILE, error) from error
    config = _read(folder / SENTENCE_CONFIG, dict)
    prompts = config.get("prompts") or {}
    default, similarity = config.get("default_prompt_name"), config.get("similarity_fn_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise _damaged(folder / SENTENCE_CONFIG, "prompts are no names and texts")
    if default is not None and default not in prompts:
        raise SourceError(
            f"{folder / SENTENCE_CONFIG} has the default prompt {default!r}, which is none of its prompts "
            f"({', '.join(prompts) or 'there are none'}). Add it there, or take default_prompt_name away."
        )
    if similarity is not None and similarity not in SIMILARITIES:
        raise _damaged(folder / SENTENCE_CONFIG, f"similarity {similarity!r} is none of {', '.join(SIMILARITIES)}")
    cut = config.get("truncate_dim")
    if cut is not None and (type(cut) is not int or cut < 1):
        raise _damaged(folder / SENTENCE_CONFIG, f"truncate_dim {cut!r} is no number of dimensions")
    own = (folder / modules[0].path / name for name in _OF_TRANSFORMER)
    return SentenceModel(
        modules,
        kind=str(config.get("model_type") or "SentenceTransformer"),
        prompts={name: text or "" for name, text in prompts.items()},  # as sentence-transformers takes null
        default_prompt=default,
        similarity=similarity,
        truncate_dim=cut,
        dims=_dims(folder, config),
        transformer=next((found for found in (_read(path, dict) for path in own) if found), {}),
    )


def load_head(folder: Path, model: SentenceModel) -> "list[nn.Module]":
    """The modules behind the transformer, in their order. Each takes a dict of features, and returns it with more.

    Raises:
        SourceError: a file is missing, damaged or a pickle.
        UnsupportedError: they are of another kind; or sentence-transformers is not installed.
    """
    if model.kind not in CLASSES:
        raise UnsupportedError(
            f"{folder} is opened by sentence-transformers' {model.kind}. hfq quantizes those of {', '.join(CLASSES)}."
        )
    first, *others = model.modules
    if first.name not in TRANSFORMERS:
        raise UnsupportedError(
            f"{folder} begins with {first.name}, and hfq quantizes sentence-transformers whose first module is a Transformer."
        )
    if first.path:
        raise UnsupportedError(
            f"{folder / MODULES_FILE} has the transformer in the folder {first.path!r}, and hfq reads it beside that file. Save the "
            "model again with sentence-transformers, which writes it there."
        )
    if not model.has(*POOLING):
        raise UnsupportedError(
            f"{folder / MODULES_FILE} names no {' or '.join(POOLING)}: how tokens become one vector is not said. Add the module "
            "with which the model was trained."
        )
    for module in others:
        if not module.type.startswith(_OWN) or module.name not in HEADS:
            raise UnsupportedError(
                f"{folder / MODULES_FILE} names a module {module.type[:100]}, which hfq cannot run. Expected some of "
                f"{', '.join(HEADS)} behind the transformer."
            )
        if module.name != WITHOUT_FILES and not (folder / module.path).is_dir():
            raise SourceError(
                f"{folder / MODULES_FILE} names the folder {module.path!r} for {module.name}, which is not there. Download the "
                "checkpoint again, with all of its folders."
            )
        _check_weights(folder / module.path if module.path else None)
    return [_load(folder, module) for module in others]


def sentence_class(folder: Path) -> Any:
    """The class of sentence-transformers that opens `folder`, one that is its own; None of any other, or if it is not installed.

    Raises:
        SourceError: a file is missing, damaged or a pickle.
    """
    model = read_sentence_model(folder)
    if model is None or not model.is_own or model.kind not in CLASSES or not find_spec("sentence_transformers"):
        return None
    for module in model.modules:
        _check_weights(folder / module.path if module.path else None)
    return getattr(import_sentence_transformers(), model.kind)


def _check_weights(folder: Path | None) -> None:
    """Refuse a module's `folder` in which weights are a pickle; one without a folder has none of its own."""
    pickled = [path.name for path in folder.glob("*.bin")] if folder else []
    if folder and pickled and not (folder / _WEIGHTS).is_file():
        raise SourceError(
            f"{folder} has only pickle weights ({', '.join(pickled)}), which can run code when they are read. Save the "
            "model again with sentence-transformers, which writes safetensors."
        )


def import_sentence_transformers() -> Any:
    """The package.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise UnsupportedError(
            "This checkpoint needs sentence-transformers, which is not installed here. Install it: "
            "`pip install sentence-transformers`."
        ) from error
    return sentence_transformers


def _load(folder: Path, module: Module) -> "nn.Module":
    from_string = import_sentence_transformers().util.import_from_string
    try:
        loaded: nn.Module = from_string(module.type).load(
            str(folder), subfolder=module.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its modules raise many types for a damaged file
        raise SourceError(
            f"sentence-transformers cannot load {folder / module.path} as {module.name}: "
            f"{' '.join(str(error).split()) or type(error).__name__}. Take all files from the same checkpoint."
        ) from error
    return loaded.float().eval().requires_grad_(False)


def _dims(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Of a configuration, else of the card that sentence-transformers writes after such a training."""
    own = _read(folder / "config.json", dict)
    named = next((found[key] for found in (config, own) for key in _DIMS if isinstance(found.get(key), list)), None)
    if named is None:
        try:
            text = read_text(folder / CARD_FILE, limit=LONGEST_CARD) if (folder / CARD_FILE).is_file() else ""
        except (OSError, ValueError):  # whoever needs it says what is wrong
            text = ""
        said = _IN_CARD.search(text)
        named = [int(number) for number in re.findall(r"\d+", said[1])] if said else []
    return sorted({dim for dim in named if isinstance(dim, int) and dim > 0}, reverse=True)


def _read(path: Path, kind: type) -> Any:
    """What a JSON file holds, nothing if there is none."""
    try:
        found = read_json(path) if path.is_file() else kind()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, kind):
        raise _damaged(path, f"it holds a {type(found).__name__}")
    return found


def _damaged(path: Path, reason: object) -> SourceError:
    return SourceError(
        f"{path} is not what sentence-transformers writes ({reason}). Download it again, or take it away."
    )
