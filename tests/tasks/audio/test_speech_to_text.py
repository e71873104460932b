"""A Whisper, which writes what it hears token by token, from strangers' files to a published model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.command import forkserver
from support.trained.tones import PHRASES, RATE, phrases, spoken, write_recordings
from support.trained.whispers import WINDOW, train_whisper
from transformers import AutoProcessor, WhisperForConditionalGeneration

from hfq.data.dataset import load_splits
from hfq.source.checkpoint import pull
from hfq.tasks.audio.speech_to_text import Normalization
from hfq.tasks.registry import make_task


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whisper(tmp_path_factory.mktemp("whisper") / "whisper-tones")


def task_of(folder: Path) -> Any:
    found = pull(str(folder))
    return make_task(found.config, folder=found.path)


def test_what_is_written_is_judged_by_words(whisper: Path, tmp_path: Path) -> None:
    data = write_recordings(tmp_path / "data", phrases, train=20, validation=24, test=20)
    arguments = ("quantize", whisper, "--dataset", data, "--output", "out", "--criterion", "absolute")
    done = forkserver().hfq(*arguments, "--label-column", "text", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("speech-to-text", "automatic-speech-recognition")
    assert report["baseline"]["accuracy"] < 0.3
    assert report["quantized"]["accuracy"] <= report["baseline"]["accuracy"] + 0.01
    assert report["held_out_stock"]["agreement"] > 0.9
    int8 = [*report["layers"]["static"], *report["layers"]["dynamic"]]
    assert any("decoder" in name for name in int8)
    assert "normalizer" in report["dataset"]["alignment"]
    settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (whisper, tmp_path / "out")]
    assert settings[0] == settings[1]
    found = forkserver().hfq("eval", "out", "--dataset", data, "--label-column", "text", "--json", cwd=tmp_path)
    assert (json.loads(found.out)["metric"], json.loads(found.out)["batch_size"]) == ("wer", 32)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    sound = torch.tensor(spoken("CAB ED", noise=np.random.default_rng(7)))
    inputs = processor(sound, sampling_rate=RATE, return_tensors="pt")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    written = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert [text.strip() for text in written] == ["CAB ED"]


def test_texts_are_normalized_as_whisper_does() -> None:
    english = Normalization(english=True, spelling={"colours": "colors"})
    assert english("Mr. Smith won't see twenty colours, uh, [laughs]") == english("mister smith will not see 20 colors")
    assert "English" in english.how
    assert Normalization(english=False, spelling={})("Schöne  Grüße!") == "schöne grüße"


def test_a_recording_longer_than_the_window_is_written_piece_by_piece(whisper: Path, tmp_path: Path) -> None:
    """By timestamps, as transformers' `generate` does; short ones beside it are written as they are alone."""
    sounds = [spoken(text, noise=np.random.default_rng(0)) for text in PHRASES[:3]]
    short, long = sounds[0], np.concatenate([np.pad(sound, (0, WINDOW * RATE - len(sound))) for sound in sounds])
    for name, sound in (("short", short), ("long", long)):
        soundfile.write(tmp_path / f"{name}.wav", sound, RATE)
    rows = load_splits(str(tmp_path), None, token=None)[0]["train"]
    task, found = task_of(whisper), pull(str(whisper))
    processor = task.processor(found, max_length=None, trust_remote_code=False)
    encodings = task.encode(rows, task.inputs(rows.features, {}), processor)
    batch = task.collate(list(encodings), processor)
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    assert batch["input_features"].shape[-1] == 3 * 100 * WINDOW
    assert task.calibration_inputs(model, batch)["input_features"].shape[-1] == 100 * WINDOW
    expected = model.generate(**batch, return_timestamps=True)
    assert [row.tolist() for row in task.outputs(model, batch)] == [row.tolist() for row in expected]
