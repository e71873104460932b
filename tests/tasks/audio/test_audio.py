"""Recordings: what is said in them, and what they are, from strangers' files to a published model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, Features, Value
from support.command import forkserver
from support.trained.tones import LETTERS, RATE, sentences, spoken, train_classifier, train_recognizer, write_recordings
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from hfq.common.errors import DataError, UsageError
from hfq.data.dataset import load_splits
from hfq.source.checkpoint import pull
from hfq.tasks.audio.recordings import waveform
from hfq.tasks.audio.speech_recognition import Spelling
from hfq.tasks.registry import make_task


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_recognizer(tmp_path_factory.mktemp("recognizer") / "wav2vec2-tones")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"), train=40, validation=48, test=40)


def task_of(folder: Path) -> Any:
    found = pull(str(folder))
    return make_task(found.config, folder=found.path)


def test_speech_is_quantized_and_judged_by_words(recognizer: Path, recordings: Path, tmp_path: Path) -> None:
    arguments = ("quantize", recognizer, "--dataset", recordings, "--output", "out", "--criterion", "absolute")
    done = forkserver().hfq(*arguments, "--label-column", "text", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("speech-recognition", "automatic-speech-recognition")
    assert (report["metric"], report["goal"]["higher_is_better"]) == ("wer", False)
    assert report["baseline"]["accuracy"] < 0.2
    assert report["quantized"]["accuracy"] <= report["baseline"]["accuracy"] + 0.01
    assert report["held_out_stock"]["agreement"] > 0.9
    first, second = (f"wav2vec2.feature_extractor.conv_layers.{i}.conv" for i in (0, 1))
    assert first not in report["layers"]["static"]  # 8 bits are too few for a waveform
    assert second in report["layers"]["static"]
    assert 'pipeline("automatic-speech-recognition"' in (tmp_path / "out" / "README.md").read_text()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    sound = torch.tensor(spoken("ABE CD DA", noise=np.random.default_rng(7)))
    inputs = processor(sound, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForCTC.from_pretrained(tmp_path / "out")(**inputs).logits
    assert processor.batch_decode(logits.argmax(-1)) == ["ABE CD DA"]


def test_kinds_of_recordings_are_told_apart(recordings: Path, tmp_path: Path) -> None:
    checkpoint = train_classifier(tmp_path / "wav2vec2-first")
    data = tmp_path / "data"
    for split in ("train", "validation"):
        for letter in LETTERS:
            (data / split / letter).mkdir(parents=True)
            for i in range(10):
                sound = spoken(letter, noise=np.random.default_rng(i + (100 if split == "train" else 0)))
                soundfile.write(data / split / letter / f"{i}.wav", sound, RATE)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"]) == ("audio-classification", "accuracy")
    assert report["baseline"]["accuracy"] > 0.9
    assert report["quantized"]["accuracy"] >= report["baseline"]["accuracy"] * 0.99


def test_recordings_without_texts_are_judged_by_agreement(recognizer: Path, recordings: Path, tmp_path: Path) -> None:
    shutil.copytree(recordings / "test", tmp_path / "data", ignore=shutil.ignore_patterns("metadata.jsonl"))
    done = forkserver().hfq("eval", recognizer, "--dataset", "data", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["metric"] == "fidelity"


def test_texts_are_spelled_as_the_model_writes() -> None:
    upper = Spelling(upper=True, lower=False, characters=frozenset("ABC' "))
    assert upper("A cab, b-c: “d” 'a") == "A CAB B C 'A"
    assert "upper case" in upper.how
    assert Spelling(upper=False, lower=True, characters=frozenset("abc "))("A  Cab!") == "a cab"


def test_error_rates_are_those_of_the_field(recognizer: Path) -> None:
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    task = task_of(recognizer)
    said = ["AB CD E", "A", "BC DE"]
    written = ["AB CE", "A", "BC DE A"]
    outputs = [_logits(task, text) for text in written]
    assert task.write(outputs) == written
    assert task.score("wer", outputs, said) == pytest.approx(float(word_error_rate(written, said)))
    assert task.score("cer", outputs, said) == pytest.approx(float(char_error_rate(written, said)))
    assert task.per_example(outputs, said).tolist() == [False, True, False]
    assert task.fidelity(outputs, outputs) == 1


def _logits(task: Any, text: str) -> torch.Tensor:
    """Of a model that is sure of each letter, with a blank after it."""
    ids = [i for letter in text for i in (task.tokenizer.convert_tokens_to_ids("|" if letter == " " else letter), 0)]
    return torch.nn.functional.one_hot(torch.tensor(ids), len(task.tokenizer)).float()


def test_padding_is_no_part_of_what_is_heard(recognizer: Path, recordings: Path) -> None:
    task, found = task_of(recognizer), pull(str(recognizer))
    rows = load_splits(str(recordings), None, token=None)[0]["test"]
    processor = task.processor(found, max_length=None, trust_remote_code=False)
    encodings = task.encode(rows, task.columns(rows.features, {"text": ["text"]}), processor)
    lengths = task.lengths(encodings)
    shortest = lengths.index(min(lengths))
    longest = lengths.index(max(lengths))
    model = AutoModelForCTC.from_pretrained(recognizer)
    with torch.inference_mode():
        alone = task.outputs(model, task.collate([encodings[shortest]], processor))
        beside = task.outputs(model, task.collate([encodings[longest], encodings[shortest]], processor))
    assert alone[0].shape == beside[1].shape
    assert task.write(alone) == task.write(beside[1:])


def test_a_long_recording_is_heard_in_windows_as_pipelines_do(recognizer: Path, tmp_path: Path) -> None:
    text = " ".join(sentences(120, seed=3))
    sound = spoken(text, noise=np.random.default_rng(1))
    assert len(sound) > 60 * RATE
    soundfile.write(tmp_path / "long.wav", sound, RATE)
    rows = load_splits(str(tmp_path), None, token=None)[0]["train"]
    task, found = task_of(recognizer), pull(str(recognizer))
    processor = task.processor(found, max_length=None, trust_remote_code=False)
    batch = task.collate(list(task.encode(rows, task.inputs(rows.features, {}), processor)), processor)
    assert batch["input_values"].shape[1] > 2
    model = AutoModelForCTC.from_pretrained(recognizer)
    with torch.inference_mode():
        (written,) = task.write(task.outputs(model, batch))
    whole = pipeline("automatic-speech-recognition", model=str(recognizer), device="cpu")
    assert written == whole({"raw": sound, "sampling_rate": RATE}, chunk_length_s=30, stride_length_s=5)["text"]
    assert sum(a == b for a, b in zip(written.split(), text.split(), strict=False)) > 100


def test_recordings_of_any_rate_and_of_several_channels_are_one_waveform(tmp_path: Path) -> None:
    sound = spoken("ACE", noise=np.random.default_rng(0), rate=8000)
    soundfile.write(tmp_path / "two.flac", np.stack([sound, sound], 1), 8000)
    found = waveform({"path": str(tmp_path / "two.flac"), "bytes": None}, RATE)
    assert found.dtype == np.float32
    assert len(found) == round(len(sound) * RATE / 8000)


BAD: dict[str, tuple[Any, str]] = {
    "empty": (np.zeros(0, np.float32), "it holds no sound"),
    "silent": (np.zeros(800, np.float32), "it is silent throughout"),
    "too short": (np.ones(30, np.float32), "it has 30 samples at 2000 Hz, and the model hears no less than 50"),
    "no numbers": (np.full(800, np.nan, np.float32), "it holds samples that are no numbers"),
    "broken": (None, "cannot be read in column 'audio'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_named(kind: str, recognizer: Path, recordings: Path, tmp_path: Path) -> None:
    sound, says = BAD[kind]
    data = tmp_path / "data"
    shutil.copytree(recordings / "test", data / "validation")
    soundfile.write(data / "validation" / "3.wav", np.ones(8) if sound is None else sound, RATE, subtype="FLOAT")
    if sound is None:
        (data / "validation" / "3.wav").write_bytes(b"RIFF and nothing")
    arguments = ("quantize", recognizer, "--dataset", data, "--label-column", "text", "--output", "out")
    done = forkserver().hfq(*arguments, cwd=tmp_path)
    assert done.code == 1
    assert says in done.err
    assert "Mend or remove it" in done.err
    assert not (tmp_path / "out").exists()


def test_texts_and_lengths_are_nothing_that_it_hears(recognizer: Path) -> None:
    task = task_of(recognizer)
    with pytest.raises(DataError, match="with recordings: none"):
        task.columns(Features({"text": Value("string")}), {})
    with pytest.raises(UsageError, match="reads recordings"):
        task.processor(pull(str(recognizer)), max_length=8, trust_remote_code=False)
    rows = Dataset.from_dict({"text": ["", "A.", "…"]})
    spelling = Spelling(upper=True, lower=False, characters=frozenset("AB "))
    assert task.references(rows, {"text": ["text"]}, spelling) == [None, "A", None]
