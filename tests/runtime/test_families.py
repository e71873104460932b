"""Each family through hfq's fast path is no further from the float model than through stock transformers."""

from pathlib import Path

import pytest
from support.errors import compared, token_inputs
from support.families import FAMILIES, LEFT, READERS_OF_TOKENS
from support.models import make_space

from hfq.export.checkpoint import write_weights_and_config
from hfq.ptq.convert import quantize_model
from hfq.ptq.scheme import LayerScheme, Plan
from hfq.tuning.candidates import Candidate

SHAPES = ((32, 2), (8, 17), (2, 600))


@pytest.mark.parametrize("name", READERS_OF_TOKENS)
def test_the_error_is_no_more_than_stock_transformers(name: str, tmp_path: Path) -> None:
    """Static layers and dynamic ones, texts of 2 to 600 tokens, with padding and without."""
    family = FAMILIES[name]
    model, words = family.make(widened=2).base_model, family.config["vocab_size"]  # a head would leave few numbers
    inputs = list(token_inputs(words, left=name in LEFT, shapes=SHAPES))
    plan = make_space(model, [batch for _, batch in inputs]).plan(Candidate("static"))
    dynamic = {layer: LayerScheme("dynamic") for layer in list(plan.layers)[::3]}
    plan = Plan({**plan.layers, **dynamic}, plan.embeddings)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    write_weights_and_config(quantize_model(model, plan, []), plan, config, folder=tmp_path)
    errors = compared(type(model).from_pretrained(tmp_path).eval(), model, tmp_path, inputs)
    assert max(errors) <= 1.15, dict(zip((name for name, _ in inputs), errors, strict=True))
