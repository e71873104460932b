"""A language of tones, one for each letter: models that hear it are trained in seconds, and files of it take no room."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

RATE = 2000  # samples a second
LETTERS = "ABCDE"
TONES = dict(zip(LETTERS, (150, 250, 380, 550, 780), strict=True))  # Hz
PHRASES = ["A BE", "CAB ED", "DEAD", "BEE CB", "EA DA D", "CC"]
LENGTH = 0.08  # seconds of a letter
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "|", *LETTERS, "<unk>"])}
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32, 32),
    "conv_kernel": (20, 4),
    "conv_stride": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "pad_token_id": 0,
    "ctc_loss_reduction": "mean",
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"), 0.0
    ),
}


def spoken(text: str, *, noise: np.random.Generator, rate: int = RATE) -> np.ndarray[Any, Any]:
    """float32 `[samples]`."""
    time = np.arange(round(LENGTH * rate)) / rate
    silence = np.zeros(len(time))
    parts = [np.sin(2 * np.pi * TONES[c] * time) * np.hanning(len(time)) if c in TONES else silence for c in text]
    sound = np.concatenate(parts)
    return (sound + noise.normal(0, 0.05, len(sound))).astype(np.float32)


def sentences(count: int, *, seed: int) -> Iterator[str]:
    """Three words of one to three letters."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join("".join(draw.choice(list(LETTERS), draw.integers(1, 4))) for _ in range(3))


def phrases(count: int, *, seed: int) -> Iterator[str]:
    """Of a few, which a model learns by heart."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield str(draw.choice(PHRASES))


def write_recordings(folder: Path, texts: Any = sentences, **counts: int) -> Path:
    """Recordings of each split with what is said in them, spelled as people write: `write_recordings(path, train=20)`."""
    for seed, (split, count) in enumerate(counts.items(), 1):
        (folder / split).mkdir(parents=True)
        rows = []
        for i, text in enumerate(texts(count, seed=seed)):
            sound = spoken(text, noise=np.random.default_rng(i), rate=2 * RATE)
            soundfile.write(folder / split / f"{i}.wav", sound, 2 * RATE)
            rows.append({"file_name": f"{i}.wav", "text": f"{text.capitalize()}.", "first": text[0]})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def train_recognizer(folder: Path) -> Path:
    """A checkpoint that writes what it hears."""
    model, extractor = _trained(Wav2Vec2ForCTC, {}, steps=100, labels=_letters)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def train_classifier(folder: Path) -> Path:
    """A checkpoint that names the first letter it hears, of two of them."""
    names = {"id2label": dict(enumerate(LETTERS)), "label2id": {letter: i for i, letter in enumerate(LETTERS)}}
    model, extractor = _trained(Wav2Vec2ForSequenceClassification, names, steps=60, labels=_first, letters=1)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def _trained(kind: Any, config: dict[str, Any], *, steps: int, labels: Any, letters: int | None = None) -> Any:
    torch.manual_seed(0)
    model = kind(Wav2Vec2Config(**SIZES, **config))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise = np.random.default_rng(0)
    for step in range(steps):
        texts = [text[:letters] for text in sentences(16, seed=1000 + step)]
        sounds = [spoken(text, noise=noise) for text in texts]
        batch = extractor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
        model(**batch, labels=labels(texts)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), extractor


def _letters(texts: list[str]) -> torch.Tensor:
    rows = [torch.tensor([VOCABULARY["|" if c == " " else c] for c in text]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _first(texts: list[str]) -> torch.Tensor:
    return torch.tensor([LETTERS.index(text[0]) for text in texts])
