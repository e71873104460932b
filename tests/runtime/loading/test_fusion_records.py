"""What is fused in a model that was opened on this machine before is what forwards on examples would find."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.models import make_space
from torch import Tensor
from torch.nn.utils import weight_norm
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hfq.export.checkpoint import write_weights_and_config
from hfq.ptq.convert import quantize_model
from hfq.runtime.compiling.skeleton import take_apart
from hfq.runtime.fusion.fuse import finish_fusing
from hfq.runtime.fusion.record import Record
from hfq.tuning.candidates import Candidate


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of records in an empty cache folder of the Hub's client."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hfq" / "fusions"


def written(name: str, folder: Path) -> Path:
    """A static int8 checkpoint of the family."""
    family = FAMILIES[name]
    model = family.make()
    plan = make_space(model, [family.inputs()]).plan(Candidate("static"))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    folder.mkdir()
    write_weights_and_config(quantize_model(model, plan, []), plan, config, folder=folder)
    return folder


def fused(name: str, folder: Path) -> Any:
    """The model in `folder`, after what its first forward does beforehand."""
    model = getattr(transformers, FAMILIES[name].model).from_pretrained(folder).eval()
    finish_fusing(model)
    return model


@torch.inference_mode()
def outputs(name: str, model: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(**FAMILIES[name].inputs())) if isinstance(leaf, Tensor)]


FUSED = ("bert with words", "deberta", "distilbert", "mpnet", "t5", "vit")


@pytest.mark.parametrize("name", FUSED)
def test_the_same_is_fused_without_a_forward(
    name: str, tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(name, tmp_path / "int8")
    found = fused(name, folder)
    assert len(list(records.iterdir())) == 1
    monkeypatch.setattr(PreTrainedModel, "dummy_inputs", property(lambda _: pytest.fail("It is given an example.")))
    again = fused(name, folder)
    assert Record.of(again) == Record.of(found)
    assert take_apart(again)[0] == take_apart(found)[0]  # type: ignore[index]  # all that a forward depends on
    assert all(map(torch.equal, outputs(name, found), outputs(name, again)))


def test_layers_whose_inputs_are_coded_otherwise_are_looked_at_anew(tmp_path: Path, records: Path) -> None:
    """Query, key and value share a matmul in the one checkpoint. In the other their codes differ."""
    folder = written("bert", tmp_path / "int8")
    assert fused("bert", folder).bert.encoder.layer[0].attention.self.query.shared_matmul
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("query.input_scale"):
            tensor.mul_(1.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    other = fused("bert", folder)
    assert not other.bert.encoder.layer[0].attention.self.query.shared_matmul
    assert len(list(records.iterdir())) == 2


@pytest.mark.parametrize("damage", ["{", "[]", '{"steps": [{}]}'])
def test_a_damaged_record_is_made_anew(damage: str, tmp_path: Path, records: Path) -> None:
    folder = written("bert", tmp_path / "int8")
    expected = Record.of(fused("bert", folder))
    (record,) = records.iterdir()
    whole = record.read_text()
    record.write_text(damage)
    assert Record.of(fused("bert", folder)) == expected
    assert record.read_text() == whole


def test_a_record_that_others_may_write_is_not_read(tmp_path: Path, records: Path) -> None:
    folder = written("bert", tmp_path / "int8")
    expected = Record.of(fused("bert", folder))
    (record,) = records.iterdir()
    record.write_text('{"steps": [], "attends": false}')
    record.chmod(0o666)
    assert Record.of(fused("bert", folder)) == expected


def test_a_cache_folder_that_cannot_be_made_changes_nothing(tmp_path: Path, records: Path) -> None:
    folder = written("bert", tmp_path / "int8")
    (tmp_path / "home").write_text("")
    assert Record.of(fused("bert", folder)).shared


def test_what_a_process_made_before_is_no_part_of_a_model() -> None:
    """torch numbers hooks, such as weight norm's, over all models of a process."""

    def skeleton() -> bytes:
        model = FAMILIES["wav2vec2"].make()
        with pytest.warns(FutureWarning, match="weight_norm"):
            weight_norm(model.wav2vec2.feature_extractor.conv_layers[1].conv)
        found = take_apart(model)
        assert found is not None
        return found[0]

    assert skeleton() == skeleton()
