"""Train the demo checkpoint: a small BERT that tells SMS spam from ham.

It is here so that the demo recipe has a real model to export without a network. It is not part of `hfq`.
Repeat it (about two minutes on one CPU core, no network):

    python pipelines/demo/train.py --output pipelines/demo/bert-mini-sms-spam

Training messages that also occur in validation or test (the corpus repeats itself) are left out, so that the
accuracy is measured on messages the model has not seen.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

HERE = Path(__file__).parent
MAX_TOKENS = 128
SPLITS = ("train", "validation", "test")


def read_splits(folder: Path) -> dict[str, pd.DataFrame]:
    """The three splits; train without the messages that validation or test hold, up to case and spaces."""
    # keep_default_na=False: a message that reads "NA" is text
    splits = {s: pd.read_csv(folder / f"{s}.csv", keep_default_na=False) for s in SPLITS}
    keys = {s: d["text"].str.lower().str.split().str.join(" ") for s, d in splits.items()}
    held_out = {*keys["validation"], *keys["test"]}
    splits["train"] = splits["train"][~keys["train"].isin(held_out)].reset_index(drop=True)
    return splits


def train_tokenizer(texts: list[str], *, vocab_size: int) -> BertTokenizer:
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers the "##x" letters in hash order, which changes from run to run and decides ties.
    # Listed in front, they have fixed numbers; as only the vocabulary is kept, they do not stay special.
    letters = sorted({c for text in texts for c in wordpiece.normalize(text) if not c.isspace()})
    special += [f"##{c}" for c in letters]
    wordpiece.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    return BertTokenizer(vocab=wordpiece.get_vocab(), do_lower_case=True, model_max_length=MAX_TOKENS)


def batches(data: pd.DataFrame, tokenizer: BertTokenizer, *, size: int, shuffle: bool = False):
    """Yield model inputs with labels: messages of like length together, to pad little."""
    order = data["text"].str.len().argsort(kind="stable").tolist()
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    for i in torch.randperm(len(groups)).tolist() if shuffle else range(len(groups)):
        part = data.iloc[groups[i]]
        encoded = tokenizer(part["text"].tolist(), padding=True, truncation=True, return_tensors="pt")
        yield {**encoded, "labels": torch.tensor(part["label"].tolist())}


@torch.no_grad()
def evaluate(model: BertForSequenceClassification, data: pd.DataFrame, tokenizer: BertTokenizer):
    """Accuracy and mean loss."""
    model.eval()
    correct, loss = 0, 0.0
    for batch in batches(data, tokenizer, size=64):
        out = model(**batch)
        correct += int((out.logits.argmax(-1) == batch["labels"]).sum())
        loss += float(out.loss) * len(batch["labels"])
    return correct / len(data), loss / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--output", type=Path, default=HERE / "bert-mini-sms-spam")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # one thread: the sums are added in one order
    set_seed(args.seed)
    start = time.perf_counter()
    splits = read_splits(HERE / "data")
    tokenizer = train_tokenizer(splits["train"]["text"].tolist(), vocab_size=args.vocab_size)
    tokenizer.save_pretrained(args.output)  # before its first use, which would store padding and truncation
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "ham", 1: "spam"},
        label2id={"ham": 0, "spam": 1},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * -(-len(splits["train"]) // args.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)

    best, best_weights = (-1.0, 0.0), {}
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch in batches(splits["train"], tokenizer, size=args.batch_size, shuffle=True):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accuracy, loss = evaluate(model, splits["validation"], tokenizer)
        print(f"epoch {epoch}: validation accuracy {accuracy:.4f}, loss {loss:.4f}", flush=True)
        if (accuracy, -loss) > best:  # a tie goes to the lower loss
            best, best_weights = (accuracy, -loss), {k: v.clone() for k, v in model.state_dict().items()}

    model.load_state_dict(best_weights)
    model.save_pretrained(args.output)
    duration_s = time.perf_counter() - start
    print(f"train: {len(splits['train'])} messages, {duration_s:.0f} s, {model.num_parameters()} parameters")
    for split in SPLITS[1:]:
        accuracy, _ = evaluate(model, splits[split], tokenizer)
        print(f"{split}: accuracy {accuracy:.4f}, always ham {1 - splits[split]['label'].mean():.4f}")


if __name__ == "__main__":
    main()
