"""The table of families in hfq/runtime/README.md: `python tests/support/family_table.py [--layers N] [NAME …]`.

Each family of `families.py` is made at base width with random weights, quantized, and opened by stock transformers and
by hfq. FP32, hfq and hfq compiled are timed in turn, in a process for each family. The rows that are measured replace
those of the same name.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.errors import compared, token_inputs
from support.families import FAMILIES, LEFT, READERS_OF_TOKENS
from support.models import make_space

import hfq
from hfq.export.checkpoint import write_weights_and_config
from hfq.ptq.convert import quantize_model
from hfq.tuning.candidates import Candidate

README = Path(hfq.__file__).parent / "runtime" / "README.md"
HEAD = "| family | file | error | 1x16 | 8x128 | note |\n|---|---|---|---|---|---|\n"
SHAPES = ((1, 16), (8, 128))
SECONDS = 1.5  # of each model at each shape, in turns
TURNS = 5
THREADS = 2
BASE = {
    **{"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "embedding_size": 768},
    **{"vocab_size": 30522, "max_position_embeddings": 640, "num_key_value_heads": 12, "head_dim": 64},
    **{"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12},
    **{"dim": 768, "n_heads": 12, "hidden_dim": 3072},
    **{"image_size": 224, "patch_size": 16},
}
LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 128},
    "deberta": {"vocab_size": 128100},
    "eurobert": {"vocab_size": 128256},
    "gemma3, bidirectional": {
        **{"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"head_dim": 256, "vocab_size": 262144},
    },
    "jina v3": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 250002},
    "longformer": {"attention_window": 512, "vocab_size": 50265},
    "modernbert": {"intermediate_size": 1152, "vocab_size": 50368},
    "qwen3": {
        **{"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        **{"vocab_size": 151669},
    },
    "roberta": {"vocab_size": 50265},
    "t5 encoder": {"vocab_size": 32128},
    "xlm-roberta": {"vocab_size": 250002},
}
TEXT = ("bert", *READERS_OF_TOKENS)
IMAGES = ("beit", "vit")


def main() -> None:
    """Measure the families that are named, or all, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*TEXT, *IMAGES)))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="print one family's row as JSON")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(row(given.names[0], given.layers)))
        return
    for name in given.names or (*TEXT, *IMAGES):
        command = [sys.executable, __file__, name, "--layers", str(given.layers), "--alone"]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        measured = found.stdout.splitlines()[-1:]
        if found.returncode or not measured:
            print(f"{name}: no row", file=sys.stderr)
            continue
        print(json.loads(measured[0]))
        write(name, json.loads(measured[0]))


def write(name: str, line: str) -> None:
    """Put `line` into the table in the place of the row of that name, in the order of names."""
    text = README.read_text(encoding="utf-8")
    before, table, after = re.split(rf"({re.escape(HEAD)}(?:\|.*\n)*)", text, maxsplit=1)
    rows = {row.split("|")[1].strip(): row for row in table.removeprefix(HEAD).splitlines()}
    rows[name] = line
    README.write_text(before + HEAD + "".join(f"{rows[key]}\n" for key in sorted(rows)) + after, encoding="utf-8")


def row(name: str, layers: int) -> str:
    """One family's line of the table."""
    os.environ["HFQ_COMPILE"] = "off"  # or what a run before has compiled would be what is called uncompiled
    torch.set_num_threads(THREADS)
    model = made(name, layers)
    inputs = dict(examples(name, model, ((8, 128), (4, 17))))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "int8").mkdir()
        model.save_pretrained(f"{folder}/float")
        plan = make_space(model, [*inputs.values()]).plan(Candidate("static"))
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        write_weights_and_config(quantize_model(model, plan, []), plan, config, folder=Path(folder, "int8"))
        int8 = type(model).from_pretrained(f"{folder}/int8").eval()
        error = max(compared(int8, model, Path(folder, "int8"), inputs.items()))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compiled = hfq.compile(type(model).from_pretrained(f"{folder}/int8").eval())
            times = [timed([model, int8, compiled], given) for _, given in examples(name, model, SHAPES, padded=False)]
        share = size(Path(folder, "int8")) / size(Path(folder, "float"))
    notes = sorted({str(warning.message).split(", ")[0] for warning in said if "hfq" in str(warning.message)})
    ratios = " | ".join(f"{fp32 / fast:.1f} ({fp32 / plain:.1f})" for fp32, plain, fast in times)
    return f"| {name} | {share:.1%} | {error:.2f} | {ratios} | {'; '.join(notes)} |"


def made(name: str, layers: int) -> Any:
    """The family's model without its head, at base width."""
    family = FAMILIES[name]
    wide = {key: BASE.get(key, value) for key, value in family.config.items()}
    wide |= {key: layers for key in LAYERS if key in wide} | OWN.get(name, {})
    return dataclasses.replace(family, config=wide).make(widened=2).base_model


def examples(
    name: str, model: Any, shapes: tuple[tuple[int, int], ...], *, padded: bool = True
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs of each shape, by name. Of images, the first number of a shape alone counts."""
    if name in IMAGES:
        for batch, _ in shapes:
            yield f"{batch}", {"pixel_values": torch.randn(batch, 3, 224, 224)}
        return
    for key, given in token_inputs(model.config.vocab_size, left=name in LEFT, shapes=shapes):
        if padded or "padded" not in key:
            yield key, given


@torch.inference_mode()
def timed(models: list[Callable[..., Any]], given: dict[str, Tensor]) -> list[float]:
    """Seconds a forward of each, medians of turns."""
    for model in models:
        for _ in range(6):  # compiled, fused, and made into a plan
            model(**given)
    found: list[list[float]] = [[] for _ in models]
    for _ in range(TURNS):
        for model, seconds in zip(models, found, strict=True):
            until = time.perf_counter() + SECONDS / TURNS
            while (start := time.perf_counter()) < until:
                model(**given)
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


def size(folder: Path) -> int:
    """Bytes of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
