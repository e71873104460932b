"""First stage: a checkpoint from the Hub or a folder, checked before anything is loaded from it.

Safetensors only: weights in pickle files can run code when they are read.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
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
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .download import fetch_file, fetch_folder, head, list_files
from .errors import HfqError, HubError, SourceError
from .hub_errors import NOT_UNDERSTOOD
from .reading import check_yaml, read_text
from .recipe import is_path
from .report import REPORT_FILE, CheckpointInfo
from .safetensors_header import TensorInfo, check_index, read_header, read_index
from .trust import check_config, check_files, check_names, check_sizes, read_config, remote_code

PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]
SUBFOLDERS = ["*/*"]  # other formats of the same weights (onnx/, openvino/, …) live there
_REMEDIES = {
    401: "Log in again with `hf auth login`, or give another token.",
    403: "Give a token that may read it, with --token or HF_TOKEN.",
    404: "Check the name, and that HF_ENDPOINT is a Hub.",
}
LONGEST_CARD = 4 << 20  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """A local folder with a checked checkpoint. `card` is the metadata of its README, `config` its config.json.

    `tensors`: what the headers of `weights` say.
    """

    info: CheckpointInfo
    path: Path
    config: dict[str, Any]
    card: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @property
    def is_quantized(self) -> bool:
        return self.config.get("quantization_config") is not None

    @property
    def size_mb(self) -> float:
        """Weight files on disk, MiB."""
        return sum(path.stat().st_size for path in self.weights) / 2**20


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
        SourceError: it does not exist, may not be read, has only pickle weights, needs remote code that was
            not allowed, or its files are damaged.
    """
    path, sha = (
        (_folder(reference), None) if is_path(reference) else _download(reference, revision, token, trust_remote_code)
    )
    if sha is None and revision is not None:
        raise _no_revision(reference, revision)
    check_files(path, reference=reference)
    config = read_config(path, reference=reference)
    code = remote_code(config, path)
    if code and not trust_remote_code:
        raise SourceError(
            f"{reference} needs code from its repository ({', '.join(code)}). "
            "Read that code, then pass --trust-remote-code to run it."
        )
    weights, tensors = _weights(path, reference)
    longest = max((max(tensor.shape, default=1) for tensor in tensors.values() if tensor.elements), default=1)
    check_config(config, longest=longest, reference=reference)
    card = _card(path)
    info = CheckpointInfo(
        id=path.resolve().name if sha is None else reference,
        revision=sha or (f"sha256:{_digest(weights)}" if hashed else "unknown"),
        license=card.get("license") if isinstance(card.get("license"), str) else None,
        language=_as_list(card.get("language")),
        remote_code=bool(code),
        remote_code_allowed=trust_remote_code,
    )
    return Checkpoint(info, path, config, card, weights, tensors)


def pull_report(reference: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder that holds the report of an export, of which nothing else is downloaded.

    Raises:
        SourceError: there is none, or it may not be read.
    """
    if is_path(reference):
        if revision is not None:
            raise _no_revision(reference, revision)
        return Path(reference).expanduser()
    with _explained(reference, revision):
        api = HfApi(token=token)
        sha = head(api, reference, revision=revision)
        listed = list_files(api, reference, revision=sha).get(REPORT_FILE)
        if listed is None:
            raise SourceError(
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


def _no_revision(reference: str, revision: str) -> SourceError:
    return SourceError(
        f"--revision {revision} was given, but {reference} is a folder; revisions exist on the Hub only."
    )


def _folder(reference: str) -> Path:
    path = Path(reference).expanduser()
    if path.suffix == ".ckpt" and path.is_file():
        from .lightning_checkpoint import as_folder  # imports torch, which folders do not need

        return as_folder(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise SourceError(
            f"Checkpoint {reference} {what}. Expected a folder with config.json and safetensors weights, a Lightning .ckpt, or a Hub id."
        )
    return path


def _download(reference: str, revision: str | None, token: str | None, trust_remote_code: bool) -> tuple[Path, str]:
    with _explained(reference, revision):
        api = HfApi(token=token)
        sha = head(api, reference, revision=revision)
        files = list_files(api, reference, revision=sha)
        check_names(files, reference)
        check_sizes({name: file.size for name, file in files.items()}, reference)
        _refuse_pickles(files, reference)
        patterns = [*PATTERNS, "*.py"] if trust_remote_code else PATTERNS
        path = fetch_folder(reference, files, revision=sha, token=token, allow=patterns, ignore=SUBFOLDERS)
    return path, sha


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
        raise SourceError(_what_failed(wrapped or error, reference, revision)) from error


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


def _weights(path: Path, reference: str) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The weight files that transformers would load, one or the shards its index names, and what is in them."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.is_file():
        return (single,), read_header(single)
    if not index.is_file():
        _refuse_pickles([file.name for file in path.iterdir()], reference)
    names = read_index(index)
    headers = {shard: read_header(path / shard) for shard in sorted(set(names.values()))}
    check_index(names, headers, path=index)
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return tuple(path / shard for shard in headers), tensors


def _refuse_pickles(names: Iterable[str], reference: str) -> None:
    top = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        return
    pickles = sorted(name for name in top if name.endswith(PICKLES))
    if pickles:
        raise SourceError(
            f"{reference} has only pickle weights ({', '.join(pickles)}), which can run code when they are read. "
            "Convert it once where you trust it: https://huggingface.co/spaces/safetensors/convert, or "
            "`AutoModel.from_pretrained(…).save_pretrained(…)`; then quantize the result."
        )
    raise SourceError(
        f"{reference} has no weights: expected model.safetensors, or shards with model.safetensors.index.json."
    )


def _card(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path / "README.md", limit=LONGEST_CARD)
        if block := REGEX_YAML_BLOCK.search(text):
            check_yaml(block[2])
        return ModelCard(text).data.to_dict()
    except Exception:  # a missing or broken README says nothing; it must not stop a good checkpoint
        return {}


def _digest(weights: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
