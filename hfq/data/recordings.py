"""A builder of `datasets` for folders of recordings that takes the files as they are, with no decoder on this machine."""

from dataclasses import dataclass
from typing import Any

import datasets
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder


@dataclass
class Recording(datasets.Audio):
    """Where a recording lies. `datasets.Audio` asks for torchcodec, and so for FFmpeg, even to note a path."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        """A path, or the file's bytes, as the table stores them."""
        if isinstance(value, str):
            return {"bytes": None, "path": value}
        return {"bytes": value.get("bytes"), "path": value.get("path")}


class Recordings(AudioFolder):
    """Rows of recordings, with their folders' names as labels or what metadata files say of them."""

    BASE_FEATURE = Recording


def as_recordings(builder: datasets.DatasetBuilder, *, token: str | None = None) -> Recordings:
    """The builder that reads the same files as `builder`, an `AudioFolder`."""
    config = builder.config
    assert isinstance(builder, AudioFolder)
    return Recordings(
        dataset_name=builder.dataset_name,
        config_name=config.name,
        hash=builder.hash,
        base_path=builder.base_path,
        token=token,
        repo_id=builder.repo_id,
        data_files=config.data_files,
        drop_labels=config.drop_labels,
        drop_metadata=config.drop_metadata,
    )
