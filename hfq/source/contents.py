"""What belongs to a checkpoint beside its weights: the files that its loaders read, and its licence.

All else in a folder is its owner's: a Trainer's state, notes, predictions. This list decides what is pulled, copied
and published. It was made by reading transformers 5.23 and sentence-transformers 5.
"""

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.errors import SourceError
from ..common.reading import read_json, read_text, walk
from .trust import check_links

SENTENCE_TRANSFORMERS = "sentence-transformers"  # the library, by the Hub's name
MODULES_FILE = "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"

# Who reads them, and their names. `*` stands for a part of a name, never for a folder.
_READ = {
    "GenerationConfig": ("generation_config.json",),
    "every tokenizer": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "one class of tokenizers or more, as its `vocab_files_names`": (
        *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json"),
        *("entity_vocab.json", "normalizer.json", "prophetnet.tokenizer", "source.spm", "target.spm"),
        *("target_vocab.json", "vocab-src.json", "vocab-tgt.json", "word_pronunciation.json", "word_shape.json"),
    ),
    "tokenizers by sentencepiece and tiktoken": (
        *("tokenizer.model", "tokenizer.model.v*", "spiece.model", "spm.model", "spm_char.model", "tiktoken.model"),
        *("sentencepiece.model", "sentencepiece.bpe.model"),
    ),
    "mistral-common's tokenizer": ("tekken.json",),
    "`apply_chat_template`": ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "processors, feature extractors, image and video processors": (
        *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
        *("audio_tokenizer_config.json", "speaker_embeddings_path.json"),
    ),
    "Wav2Vec2ProcessorWithLM": (
        *("alphabet.json", "language_model/attrs.json", "language_model/unigrams.txt"),
        *("language_model/*.arpa", "language_model/*.bin"),
    ),
    SENTENCE_TRANSFORMERS: (
        *(MODULES_FILE, SENTENCE_CONFIG, "router_config.json", "sentence_bert_config.json"),
        *("sentence_roberta_config.json", "sentence_distilbert_config.json", "sentence_camembert_config.json"),
        *("sentence_albert_config.json", "sentence_xlm-roberta_config.json", "sentence_xlnet_config.json"),
    ),
}
# Read by sentence-transformers in the folders that modules.json names. Their weights are copied as they are.
_READ_IN_MODULES = (
    *("config.json", "cnn_config.json", "lstm_config.json", "wordembedding_config.json", "idf.json"),
    *("whitespacetokenizer_config.json", "phrasetokenizer_config.json", "stopwords.txt"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
_KINDS = (
    r"(apache|mit|bsd|[al]?gpl|mpl|cc|by|nc|nd|sa|openrail|rail|llama|gemma|qwen|model|code|weights|data|dataset|"
    r"third[-_ ]?party|community|commercial|research|lesser|agreement|policy)[a-z0-9]*|\d+"
)
_LICENCE = re.compile(
    rf"(({_KINDS})[-_. ])*"
    r"(licen[cs]es?|unlicen[cs]e|copying|copyright|notices?|eula|(acceptable[-_ ])?use[-_ ]policy|terms[-_ ]of[-_ ]use)"
    rf"([-_. ]({_KINDS}))*(\.(txt|md|rst|pdf|html?))?",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".pdf", ".htm", ".html")  # of a file that license_link names
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", MODULES_FILE)
_FILE_IN_CODE = re.compile(r"\w[\w-]*(\.[\w-]+)+")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".index.json")


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name).replace(r"\*", "[^/]*") for name in names))


_BELONGS = _pattern(name for names in _READ.values() for name in names)
_BELONGS_IN_MODULES = _pattern([*(name for names in _READ.values() for name in names), *_READ_IN_MODULES])


@dataclass(frozen=True)
class Contents:
    """`name in contents`: whether a file, by its path in the folder, belongs to the checkpoint.

    `modules`: folders that modules.json names. `code`: the checkpoint's own, with the files that it names, where it was
    allowed. `licence`: the file that the card links to as such.
    """

    modules: tuple[str, ...] = ()
    code: frozenset[str] = frozenset()
    licence: str | None = None

    def __contains__(self, name: str) -> bool:
        if not is_inside(name):
            return False
        if name in self.code or _BELONGS.fullmatch(name) or self.is_licence(name):
            return True
        base = name.rpartition("/")[2]
        return any(name.startswith(f"{folder}/") for folder in self.modules) and bool(
            _BELONGS_IN_MODULES.fullmatch(base) or _LICENCE.fullmatch(base)
        )

    def is_licence(self, name: str) -> bool:
        """Whether a file says what may be done with the checkpoint."""
        return name == self.licence or bool(_LICENCE.fullmatch(name))


def read_contents(folder: Path, *, code: bool, license_link: object = None) -> Contents:
    """What belongs to the checkpoint in `folder`.

    Args:
        code: code of its own was allowed, so that it belongs too, with the files that it names.
        license_link: of the card's metadata; a file of the folder that it names is the licence.

    Raises:
        SourceError: modules.json is damaged, or names a folder elsewhere.
    """
    linked = relative_link(license_link)
    is_text = linked and PurePosixPath(linked).suffix.lower() in _TEXT_SUFFIXES
    licence = linked if is_text and linked != "README.md" else None  # each export has a README of its own
    return Contents(_modules(folder), frozenset(_code(folder) if code else ()), licence)


def list_contents(folder: Path, contents: Contents) -> list[str]:
    """The files of `folder` that belong, by path.

    Raises:
        SourceError: one lies elsewhere, by way of a link.
    """
    found = [name for name in list_names(folder, contents) if name in contents]
    check_links((folder / name for name in found), folder=folder)
    return found


def list_names(folder: Path, contents: Contents, *, also: Iterable[str] = ()) -> list[str]:
    """Files of `folder` by path; a folder in which nothing can belong is one name, which ends with a slash.

    `also`: folders to look into.
    """
    inside = {*also, *(name.split("/")[0] for name in (*_folders(), *contents.modules))}
    if contents.licence and "/" in contents.licence:
        inside.add(contents.licence.split("/")[0])
    return sorted(_names(folder, inside))


def left_behind(names: Iterable[str], kept: Collection[str]) -> list[str]:
    """Those of `names` that are not kept; a folder of which nothing is kept is one name. Git's own files do not count."""
    known = {name.split("/")[0] for name in kept}
    left = {name for name in names if name not in kept and not name.startswith((".git", ".cache"))}
    return sorted(
        {name if "/" not in name or name.split("/")[0] in known else f"{name.split('/')[0]}/" for name in left}
    )


def relative_link(link: object) -> str | None:
    """The file of its own repository that a `license_link` names."""
    if not isinstance(link, str):
        return None
    name = link.strip().removeprefix("./")
    return name if is_inside(name) and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) else None


def is_inside(name: str) -> bool:
    """Whether a path can only lead to a file inside of a folder that is in plain sight."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part == "" or part.startswith(".") for part in parts)


def _folders() -> Iterator[str]:
    return (name for names in _READ.values() for name in names if "/" in name)


def _names(folder: Path, inside: set[str]) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir() and path.name in inside:
            yield from (file.relative_to(folder).as_posix() for file in path.rglob("*") if file.is_file())
        elif path.is_dir():
            yield f"{path.name}/"
        elif path.is_file():
            yield path.name


def _modules(folder: Path) -> tuple[str, ...]:
    file = folder / MODULES_FILE
    if not file.is_file():
        return ()
    try:
        paths = [module["path"] for module in read_json(file)]
        if not all(isinstance(path, str) for path in paths):
            raise TypeError("a path is no text")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{file} is no list of a sentence-transformers model's modules ({error}). Download it again, or take it away."
        ) from error
    for path in paths:
        if path and not is_inside(path):
            raise SourceError(
                f"{file} names the folder {path[:200]!r}, which is none inside of the checkpoint. Nothing was taken from "
                "there; mend the file."
            )
    return tuple(path for path in paths if path)


def _code(folder: Path) -> set[str]:
    """The modules of a checkpoint's own code, as `auto_map` and their imports name them, and the files they name."""
    waiting = {name for file in _CONFIGS for name in _classes(_lenient_json(folder / file))}
    found: set[str] = set()
    files: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name in found or not path.is_file():
            continue
        found.add(name)
        try:
            tree = ast.parse(read_text(path))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):  # it will not run either
            continue
        waiting |= set(_imports(tree))
        files |= set(_file_names(tree))
    return found | files


def _classes(config: Any) -> Iterator[str]:
    """Files of the classes `module.Class` in `auto_map` and `custom_pipelines`, and of the types in modules.json."""
    maps = [config.get(key) for key in ("auto_map", "custom_pipelines")] if isinstance(config, dict) else []
    types = [module.get("type") for module in config if isinstance(module, dict)] if isinstance(config, list) else []
    for _, value in walk([*maps, *types]):
        if isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value):
            yield f"{value.split('.')[0]}.py"


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from (f"{name}.py" for name in ([node.module] if node.module else [it.name for it in node.names]))


def _file_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and _FILE_IN_CODE.fullmatch(text) and not text.endswith(_WEIGHTS):
            yield text


def _lenient_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):  # whoever needs it says what is wrong
        return None
