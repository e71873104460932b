"""How much of a float model is in memory while it is quantized, and how long int8 copies of it stay there."""

import gc
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from support.models import logits, tiny, token_batches
from torch import nn
from transformers import AutoModelForSequenceClassification

from hfq.common.memory import drop_file_pages
from hfq.ptq.calibration import calibrate
from hfq.ptq.convert import int8_linear
from hfq.ptq.scheme import LayerScheme

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of a file that this process has in memory through its mappings."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"^Rss: +(\d+) kB", text, re.MULTILINE) for text in mappings if str(path) in text]
    return sum(int(size[1]) << 10 for size in sizes if size)


@needs_linux
def test_calibration_has_a_few_layers_of_the_float_file_in_memory(tmp_path: Path) -> None:
    tiny(hidden_size=256, num_hidden_layers=6, intermediate_size=1024).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batches = token_batches(1, rows=32)
    before = logits(model, batches)
    assert resident(file) > 0.9 * file.stat().st_size, "its weights are in the file, and were read whole"
    seen = []
    handle = model.bert.encoder.layer[-1].register_forward_hook(lambda *_: seen.append(resident(file)))
    calibrate(model, ["bert.encoder.layer.0.output.dense"], batches)
    handle.remove()
    assert max(seen) < 0.4 * file.stat().st_size
    assert torch.equal(logits(model, batches), before)


@needs_linux
def test_what_was_written_to_a_weight_in_memory_stays(tmp_path: Path) -> None:
    tiny(hidden_size=128).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).requires_grad_(False)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    weight[64, 64] = 7.0
    own = torch.ones(1 << 16)
    for tensor in (weight, own):
        drop_file_pages(tensor)
    assert weight[64, 64] == 7.0
    assert own.sum() == 1 << 16


def test_int8_layer_is_freed_as_soon_as_nobody_uses_it() -> None:
    int8 = int8_linear(nn.Linear(8, 8), LayerScheme.static((-1.0, 1.0)))
    int8(torch.zeros(1, 8))
    gone = weakref.ref(int8)
    gc.disable()
    try:
        del int8
        assert gone() is None
    finally:
        gc.enable()
