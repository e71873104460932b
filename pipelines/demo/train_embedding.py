"""Train the demo embedding model: a tiny BERT whose vectors say how many words two SMS messages share.

It is here so that the demo recipe of embeddings has a real sentence-transformers model without a network. It is not part
of `hfq`. Repeat it (a minute and a half on one CPU core, no network); it writes the pairs, too:

    python pipelines/demo/train_embedding.py
"""

import argparse
import random
from pathlib import Path

import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch.nn.functional import cosine_similarity, mse_loss
from train import HERE, MAX_TOKENS, SPLITS, read_splits, train_tokenizer
from transformers import BertConfig, BertModel, get_linear_schedule_with_warmup, set_seed

HIGHEST = 5  # score of a message with itself, as in the STS Benchmark
KEPT_PAIRS = {"train": 300, "validation": 400, "test": 400}  # in the files; training makes more from the messages


def make_pairs(texts: list[str], *, seed: int) -> pd.DataFrame:
    """Each message beside one that has some of its words, in their places, and else another message's."""
    generator, rows = random.Random(seed), []  # noqa: S311 - nothing secret
    for text in texts:
        own, other = text.split(), generator.choice(texts).split()
        share = generator.randrange(6) / 5
        kept = [generator.random() < share for _ in own]
        mixed = [word if keep else generator.choice(other) for word, keep in zip(own, kept, strict=True)]
        score = HIGHEST * sum(a == b for a, b in zip(own, mixed, strict=True)) / len(own)
        rows.append((text, " ".join(mixed), round(score, 2)))
    return pd.DataFrame(rows, columns=["sentence1", "sentence2", "score"])


def cosines(model: SentenceTransformer, pairs: pd.DataFrame) -> torch.Tensor:
    """Of each pair, in the model's mode: with gradients while it is trained."""
    first, second = (
        model(model.preprocess(pairs[name].tolist()))["sentence_embedding"] for name in ("sentence1", "sentence2")
    )
    return cosine_similarity(first, second)


@torch.no_grad()
def spearman(model: SentenceTransformer, pairs: pd.DataFrame) -> float:
    """Of cosines and scores."""
    model.eval()
    found = torch.cat([cosines(model, pairs[start : start + 64]) for start in range(0, len(pairs), 64)])
    return pd.Series(found.tolist()).corr(pairs["score"].reset_index(drop=True), method="spearman")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo embedding model.")
    parser.add_argument("--output", type=Path, default=HERE / "bert-tiny-sms-embedding")
    parser.add_argument("--pairs", type=Path, default=HERE / "pairs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # one thread: the sums are added in one order
    set_seed(args.seed)
    texts = {
        split: [text for text in rows["text"] if text.split()] for split, rows in read_splits(HERE / "data").items()
    }
    pairs = {
        split: make_pairs(texts[split], seed=number).head(KEPT_PAIRS[split]) for number, split in enumerate(SPLITS)
    }
    args.pairs.mkdir(exist_ok=True)
    for split, rows in pairs.items():
        rows.to_csv(args.pairs / f"{split}.csv", index=False)

    tokenizer = train_tokenizer(texts["train"], vocab_size=2000)
    tokenizer.save_pretrained(args.output)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(args.output)
    encoder = Transformer(str(args.output), max_seq_length=MAX_TOKENS)
    model = SentenceTransformer(modules=[encoder, Pooling(config.hidden_size, "mean"), Normalize()], device="cpu")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = args.epochs * -(-len(texts["train"]) // 32)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for epoch in range(args.epochs):
        model.train()
        made = make_pairs(texts["train"], seed=100 + epoch).sample(frac=1, random_state=epoch)
        for start in range(0, len(made), 32):
            some = made[start : start + 32]
            target = torch.tensor(some["score"].tolist()) / HIGHEST
            mse_loss(cosines(model, some), target).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: validation Spearman {spearman(model, pairs['validation']):.4f}", flush=True)
    model.save(str(args.output), create_model_card=False)
    print(
        f"test: Spearman {spearman(model, pairs['test']):.4f}, {sum(p.numel() for p in model.parameters())} parameters"
    )


if __name__ == "__main__":
    main()
