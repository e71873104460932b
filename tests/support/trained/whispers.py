"""A Whisper that writes what it hears of the language of tones, token by token."""

from pathlib import Path

import numpy as np
import torch
from support.trained.tones import LETTERS, RATE, phrases, spoken
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

WINDOW = 1  # seconds that it hears at once
END, START, PLAIN = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
STAMPS = [f"<|{0.02 * i:.2f}|>" for i in range(50 * WINDOW + 1)]
VOCABULARY = {
    token: i for i, token in enumerate([*LETTERS, *(f"Ġ{letter}" for letter in LETTERS), END, START, PLAIN, *STAMPS])
}
MERGES = [("Ġ", letter) for letter in LETTERS]


def train_whisper(folder: Path, *, steps: int = 60) -> Path:
    """A checkpoint in `folder`."""
    torch.manual_seed(0)
    tokenizer = WhisperTokenizer(vocab={**VOCABULARY, "Ġ": len(VOCABULARY)}, merges=MERGES)
    tokenizer.save_pretrained(folder)
    end, start, plain = (VOCABULARY[token] for token in (END, START, PLAIN))
    config = WhisperConfig(
        vocab_size=len(VOCABULARY) + 1,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50 * WINDOW,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    extractor = WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=RATE // 100, chunk_length=WINDOW, n_fft=100
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    noise = np.random.default_rng(0)
    for step in range(steps):
        texts = list(phrases(32, seed=1000 + step))
        sounds = [spoken(text, noise=noise) for text in texts]
        features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        ids = [torch.tensor([plain, *tokenizer(f" {text}", add_special_tokens=False).input_ids, end]) for text in texts]
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        model(input_features=features, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
    settings = GenerationConfig(max_length=32, pad_token_id=end, eos_token_id=end, decoder_start_token_id=start)
    settings.no_timestamps_token_id, settings.is_multilingual = plain, False
    model.generation_config = settings
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder
