"""First stage: a checkpoint from the Hub or a folder, checked before anything is loaded from it.

Safetensors only: weights in pickle files can run code when they are read.
"""

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..common.errors import HfqError, HubError, SourceError, UsageError, WrongCheckpointError
from ..common.files import user_path
from ..common.names import CARD_FILE, REPORT_FILE, is_path
from ..common.safetensors_header import TensorInfo, check_index, read_header, read_index
from ..hub.download import Files, fetch_file, fetch_folder, head, list_files
from ..hub.errors import NOT_UNDERSTOOD
from .contents import MODULES_FILE, SENTENCE_CONFIG, Contents, left_behind, list_names, read_contents, relative_link
from .metadata import forbids_derivatives, in_words, licences_of, read_card, terms_of
from .trust import ADAPTER, check_config, check_files, check_names, check_sizes, read_config, remote_code

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_REPLACED = ("config.json", CARD_FILE, REPORT_FILE, WEIGHTS_FILE, INDEX_FILE)  # each export has its own
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(
    r"model\.(?P<a>[\w-]+?)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.(?P<b>[\w-]+)\.json"
)
_REMEDIES = {
    401: "Log in again with `hf auth login`, or give another token.",
    403: "Give a token that may read it, with --token or HF_TOKEN.",
    404: "Check the name, and that HF_ENDPOINT is a Hub.",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where the float model came from. `revision` is a commit sha, or `sha256:…` of a local folder's weights.

    `remote_code`: it brings code of its own. `remote_code_allowed`: --trust-remote-code was given, so that it ran.
    `terms`: what else the metadata of its card say of who may do what with it, as they say it. `license_files`: beside it.
    """

    id: str
    revision: str
    license: str | list[str] | None = None
    language: list[str] = field(default_factory=list)
    remote_code: bool = False
    remote_code_allowed: bool = False
    terms: dict[str, Any] = field(default_factory=dict)
    license_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A local folder with a checked checkpoint. `card` is the metadata of its README, `config` its config.json.

    `tensors`: what the headers of `weights` say. `contents`: what else belongs to it, and `left` what lies there and
    does not. `warnings`: what to say of it before anything is done with it.
    """

    info: CheckpointInfo
    path: Path
    config: dict[str, Any]
    card: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    contents: Contents = field(default_factory=Contents)
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        return self.config.get("quantization_config") is not None

    @property
    def is_sentence_model(self) -> bool:
        """Whether its files say that sentence-transformers opens it."""
        known = any((self.path / name).is_file() for name in (MODULES_FILE, SENTENCE_CONFIG))
        return known or "sentence_transformers" in self.config  # so CrossEncoder wrote it

    @property
    def size_mib(self) -> float:
        """Weight files on disk, MiB."""
        return sum(path.stat().st_size for path in self.weights) / 2**20

    @property
    def float32_mib(self) -> float:
        """What its tensors take in float32, MiB: more than its files where they hold them in 16 bits."""
        return sum(tensor.elements for tensor in self.tensors.values()) * 4 / 2**20


def pull(
    reference: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    hashed: bool = True,
) -> Checkpoint:
    """Bring a checkpoint here and check its files.

    Args:
        hashed: know a folder, which has no revision, by the SHA-256 of its weights. It takes seconds for a gigabyte.

    Raises:
        WrongCheckpointError: it does not exist, or is none that can be opened, such as one of pickle weights.
        UsageError: it needs remote code that was not allowed.
        SourceError: it may not be read, or its files are damaged.
    """
    if is_path(reference):
        path, sha, names = _folder(reference), None, None
        if revision is not None:
            raise _no_revision(reference, revision)
        check_files(path, reference=reference)
        _check_layout(_deep_names(path), reference)
    else:
        path, sha, names = _download(reference, revision, token, trust_remote_code)
        check_files(path, reference=reference)
    config = read_config(path, reference=reference)
    code = remote_code(config, path)
    if code and not trust_remote_code:
        raise UsageError(
            f"{reference} needs code from its repository ({', '.join(code)}). "
            "Read that code, then pass --trust-remote-code to run it."
        )
    weights, tensors = _weights(path)
    longest = max((max(tensor.shape, default=1) for tensor in tensors.values() if tensor.elements), default=1)
    check_config(config, longest=longest, reference=reference)
    card, unread = _card(path)
    contents = read_contents(path, code=bool(code), license_link=card.get("license_link"))
    names = names or list_names(path, contents)
    kept = {name for name in names if name in contents or name in _REPLACED} | {file.name for file in weights}
    info = CheckpointInfo(
        id=path.resolve().name if sha is None else reference,
        revision=sha or (f"sha256:{_digest(weights)}" if hashed else "unknown"),
        license=_one_or_all(licences_of(card)),
        language=in_words(card.get("language")),
        remote_code=bool(code),
        remote_code_allowed=trust_remote_code,
        terms=_resolved(terms_of(card), contents=contents, names=names, origin=sha and f"{reference}/blob/{sha}"),
        license_files=sorted(name for name in names if contents.is_licence(name)),
    )
    warnings = (*unread, *_licence_warnings(card, info))
    left = tuple(left_behind(names, kept))
    return Checkpoint(info, path, config, card, weights, tensors, contents, left, warnings)


def pull_report(reference: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder that holds the report of an export, of which nothing else is downloaded.

    Raises:
        SourceError: there is none, or it may not be read.
    """
    if is_path(reference):
        if revision is not None:
            raise _no_revision(reference, revision)
        return user_path(reference)
    with _explained(reference, revision):
        api = HfApi(token=token)
        sha = head(api, reference, revision=revision)
        listed = list_files(api, reference, revision=sha).get(REPORT_FILE)
        if listed is None:
            raise WrongCheckpointError(
                f"{reference} has no {REPORT_FILE}: it was not published by hfq. Expected the result of `hfq push`."
            )
        return fetch_file(reference, listed, revision=sha, token=token).parent


def head_revision(
    reference: str, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> str:
    """What `pull` would record as the revision of a checkpoint, now. Of one on the Hub, no file is downloaded.

    Raises:
        SourceError: it does not exist, or may not be read.
    """
    if is_path(reference):
        return pull(reference, revision=revision, trust_remote_code=trust_remote_code).info.revision
    with _explained(reference, revision):
        return head(HfApi(token=token), reference, revision=revision)


def _no_revision(reference: str, revision: str) -> UsageError:
    return UsageError(f"--revision {revision} was given, but {reference} is a folder; revisions exist on the Hub only.")


def _folder(reference: str) -> Path:
    path = user_path(reference)
    if path.suffix == ".ckpt" and path.is_file():
        from .lightning_checkpoint import as_folder  # imports torch, which folders do not need

        return as_folder(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise WrongCheckpointError(
            f"Checkpoint {reference} {what}. Expected a folder with config.json and safetensors weights, a Lightning .ckpt, or a Hub id."
        )
    return path


def _download(
    reference: str, revision: str | None, token: str | None, trust_remote_code: bool
) -> tuple[Path, str, list[str]]:
    """The folder with what belongs to the checkpoint, its commit, and the names of all its files on the Hub."""
    with _explained(reference, revision):
        api = HfApi(token=token)
        sha = head(api, reference, revision=revision)
        files = list_files(api, reference, revision=sha)
        check_names(files, reference)
        check_sizes({name: file.size for name, file in files.items()}, reference)
        _check_layout(list(files), reference)
        wanted = {name for name in files if name in (*_REPLACED, ADAPTER) or name in Contents()}
        if trust_remote_code:
            wanted |= {name for name in files if "/" not in name and name.endswith(".py")}
        if WEIGHTS_FILE in wanted:
            wanted.discard(INDEX_FILE)
        path = _fetch(reference, files, wanted, sha=sha, token=token)
        if more := _named(path, files, code=trust_remote_code) - wanted:
            path = _fetch(reference, files, wanted | more, sha=sha, token=token)
    return path, sha, list(files)


def _named(path: Path, files: Iterable[str], *, code: bool) -> set[str]:
    """What belongs by the word of files that are here: shards, modules, the licence, what the code reads."""
    contents = read_contents(path, code=code, license_link=_card(path)[0].get("license_link"))
    shards = set(read_index(path / INDEX_FILE, beside=files).values()) if (path / INDEX_FILE).is_file() else set()
    return {name for name in files if name in contents} | shards


def _fetch(reference: str, files: Files, wanted: Iterable[str], *, sha: str, token: str | None) -> Path:
    exact = sorted(glob.escape(name) for name in wanted)
    return fetch_folder(reference, files, revision=sha, token=token, allow=exact, ignore=[])


@contextmanager
def _explained(reference: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises about a checkpoint into one `SourceError`."""
    try:
        yield
    except HubError as error:
        raise SourceError(str(error)) from error
    except HfqError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, *NOT_UNDERSTOOD) as error:
        wrapped = isinstance(error, LocalEntryNotFoundError) and error.__cause__  # says only that one occurred
        misnamed = isinstance(error, RevisionNotFoundError | HFValidationError)
        raise (WrongCheckpointError if misnamed else SourceError)(
            _what_failed(wrapped or error, reference, revision)
        ) from error


def _what_failed(error: BaseException, reference: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return f"{reference} is gated. Ask for access on its page, then pass --token or set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"{reference} has no revision {revision!r}. Expected a branch, tag or commit of it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{reference} is not on the Hub, or is private. Check the name; for a private repository pass --token "
            f"or set HF_TOKEN; for a folder write ./{reference.split('/')[-1]}."
        )
    if isinstance(error, HFValidationError):
        return f"{reference!r} is neither a folder nor a Hub id ('name' or 'owner/name')."
    if isinstance(error, EntryNotFoundError):
        return f"{reference} could not be pulled whole: {_first_line(error)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = _REMEDIES.get(status, "Try again later.")
        return f"The Hub refused {reference} ({status}): {error.server_message or _first_line(error)}. {remedy}"
    if is_network_error(error):
        return f"The Hub could not be reached for {reference}: {_first_line(error)}. Check the network."
    if isinstance(error, (*NOT_UNDERSTOOD, JSONDecodeError)):
        return (
            f"{reference} could not be pulled: the answer is not the Hub's ({type(error).__name__}: {_first_line(error)}). "
            "Check HF_ENDPOINT and what stands between (a proxy, a login page)."
        )
    return f"{reference} could not be pulled: {_first_line(error)}"


def is_network_error(error: BaseException) -> bool:
    """Whether an HTTP client raised this because it could not reach or understand the other side."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")


def _weights(path: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The weight files that transformers would load, one or the shards its index names, and what is in them."""
    index = path / INDEX_FILE
    single = path / WEIGHTS_FILE
    if single.is_file():
        return (single,), read_header(single)
    names = read_index(index)
    headers = {shard: read_header(path / shard) for shard in sorted(set(names.values()))}
    check_index(names, headers, path=index)
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return tuple(path / shard for shard in headers), tensors


def _deep_names(path: Path) -> list[str]:
    """Files of a folder and of the folders in it."""
    return [file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()]


def _check_layout(names: Iterable[str], reference: str) -> None:
    """Refuse files among which there is no checkpoint that can be opened, and say what they are.

    Raises:
        WrongCheckpointError: weights or config.json are missing, elsewhere, or of another kind.
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    whole = WEIGHTS_FILE in top or INDEX_FILE in top
    if ADAPTER in top or (whole and "config.json" in top):
        return
    if folders := _checkpoints_inside(names):
        raise WrongCheckpointError(_lies_elsewhere(folders, reference, is_sentence_model=MODULES_FILE in top))
    if not whole and (refusal := _refusal_of_weights(top, reference)):
        raise refusal


def _checkpoints_inside(names: Iterable[str]) -> list[str]:
    """Folders with config.json and weights."""
    found: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder and "/" not in folder:
            found.setdefault(folder, []).append(file)
    return [
        folder
        for folder, files in found.items()
        if "config.json" in files and any(file.endswith((".safetensors", *PICKLES)) for file in files)
    ]


def _lies_elsewhere(folders: list[str], reference: str, *, is_sentence_model: bool) -> str:
    if not is_sentence_model:
        return (
            f"{reference} is no checkpoint itself, but has some in it: {', '.join(folders[:5])}. "
            f"Expected the folder of one, such as {_inside(reference, folders[-1])}."
        )
    folder = next((name for name in folders if "Transformer" in name), folders[0])
    return (
        f"{reference} is a sentence-transformers model whose transformer, with config.json and weights, is in {folder}/, as "
        f"{MODULES_FILE} says; expected them at the top, as sentence-transformers writes them today. Have it written anew, "
        f"`SentenceTransformer({reference!r}).save('./model')`, and quantize ./model."
    )


def _inside(reference: str, folder: str) -> str:
    if is_path(reference):
        return str(Path(reference) / folder)
    return f"the folder that `hf download {reference} --include '{folder}/*' --local-dir .` makes"


def _refusal_of_weights(top: list[str], reference: str) -> SourceError | None:
    """Why the files at the top of a checkpoint are not the weights that are expected there."""
    expected = f"expected {WEIGHTS_FILE}, or shards with {INDEX_FILE}"
    variants = sorted({match["a"] or match["b"] for name in top if (match := _VARIANT.fullmatch(name))})
    pickles = [name for name in top if name.endswith(PICKLES)]
    others = [name for name in top if name.endswith(".safetensors")]
    if variants:
        return WrongCheckpointError(
            f"{reference} has weights of a variant only ({', '.join(variants)}): {expected}. Save them under that name "
            f"with `AutoModelForSequenceClassification.from_pretrained(…, variant={variants[0]!r}).save_pretrained(…)` and "
            "the tokenizer beside them; then quantize the result."
        )
    if any(map(_SHARD.fullmatch, others)):
        return SourceError(
            f"{reference} has shards of weights, but not {INDEX_FILE}, which says what is where. Download it again."
        )
    if others:
        found = ", ".join(others[:3])
        return WrongCheckpointError(f"{reference} has no weights that transformers looks for, but {found}: {expected}.")
    if pickles:
        return WrongCheckpointError(
            f"{reference} has only pickle weights ({', '.join(pickles)}), which can run code when they are read. "
            "Convert it once where you trust it: https://huggingface.co/spaces/safetensors/convert, or "
            "`AutoModel.from_pretrained(…).save_pretrained(…)`; then quantize the result."
        )
    return WrongCheckpointError(f"{reference} has no weights: {expected}.") if "config.json" in top else None


def _card(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The README's metadata, and what to warn of. A broken README must not stop a good checkpoint."""
    try:
        card = read_card(path / CARD_FILE)
    except ValueError as error:
        return {}, [
            f"The metadata of {CARD_FILE} cannot be read ({error}), so that neither licence nor language is known: look at "
            "them before you publish."
        ]
    try:
        model_index_to_eval_results(card.get("model-index") or [])
    except Exception:  # it names datasets; the rest of the card is none the worse
        card = {key: value for key, value in card.items() if key != "model-index"}
    return card, []


def _one_or_all(found: list[str]) -> str | list[str] | None:
    return found[0] if len(found) == 1 else found or None


def _licence_warnings(card: Mapping[str, Any], info: CheckpointInfo) -> Iterator[str]:
    if forbids_derivatives(card):
        said = ", ".join([*licences_of(card), *in_words(card.get("license_name"))])
        yield (
            f"The licence of {info.id} ({said}) forbids derived works, and an INT8 version may well be one. "
            "Ask its owner before you publish it."
        )
    link = relative_link(info.terms.get("license_link"))
    if link and link not in info.license_files:
        yield f"license_link of {info.id} names {link}, which is no licence file there: the card cannot show it."


def _resolved(
    terms: Mapping[str, Any], *, contents: Contents, names: Iterable[str], origin: str | None
) -> dict[str, Any]:
    """The terms with a `license_link` that leads to the same file from another repository.

    It stays relative where that file is copied. `origin`: where files are on the Hub.
    """
    link = relative_link(terms.get("license_link"))
    if link is None:
        return dict(terms)
    copied = link in names and contents.is_licence(link)
    return {**terms, "license_link": link if copied or not origin else f"https://huggingface.co/{origin}/{link}"}


def _digest(weights: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
