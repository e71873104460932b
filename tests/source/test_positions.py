"""The longest text a model takes is what its position embedding holds, and a batch needs a padding token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command import CHECKPOINT

from hfq.source.checkpoint import pull
from hfq.source.positions import lacks_padding, most_tokens

MOST = 24
ROBERTAS = (
    "Roberta",
    "XLMRoberta",
    "XLMRobertaXL",
    "Camembert",
    "MPNet",
    "Longformer",
    "Data2VecText",
    "IBert",
    "Xmod",
)
ROBERTAS += ("RobertaPreLayerNorm", "Esm", "Luke", "MarkupLM")
OTHERS = ("Bert", "Electra", "DistilBert", "Nystromformer", "Mra", "XLM", "GPT2", "OPT", "OpenAIGPT", "FNet")
OWN: dict[str, dict[str, Any]] = {"Longformer": {"attention_window": 8}, "Xmod": {"default_language": "en_XX"}}


def small(family: str) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    own = {"vocab_size": 100, "pad_token_id": 1, "max_position_embeddings": MOST, **OWN.get(family, {})}
    config = getattr(transformers, f"{family}Config")(**sizes, **own)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("family", [*ROBERTAS, *OTHERS])
def test_the_longest_text_is_as_long_as_the_position_embedding_allows(family: str) -> None:
    model = small(family)
    most = most_tokens(model)
    assert most == (MOST - 2 if family in ROBERTAS else MOST)
    with torch.inference_mode():
        ids = torch.full((2, most), 7)
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
        ids = torch.full((2, most + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(("family", "lacks"), [("Roberta", True), ("GPT2", True), ("OpenAIGPT", True), ("Bert", False)])
def test_a_model_that_needs_a_padding_token_is_found(family: str, lacks: bool, tmp_path: Path) -> None:
    small(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    found = lacks_padding(pull(str(tmp_path)), "AutoModelForSequenceClassification", trust_remote_code=False, padding=1)
    assert found is lacks


def test_a_model_with_a_padding_token_lacks_none() -> None:
    auto = "AutoModelForSequenceClassification"
    assert not lacks_padding(pull(str(CHECKPOINT)), auto, trust_remote_code=False, padding=0)
