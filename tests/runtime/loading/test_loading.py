"""An exported folder opens everywhere: without hfq, with it imported first or last, and through `hfq.load`."""

import copy
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from support.command import PATIENCE, stock_python
from support.models import ROUNDING, assert_same, int8_linears, logits, make_space, relative_error, tiny, token_batches
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    CompressedTensorsConfig,
    Trainer,
    TrainingArguments,
)

import hfq
import hfq.export.checkpoint
from hfq.common.errors import ExportError, SourceError, UnsupportedError, UsageError
from hfq.export.checkpoint import export
from hfq.ptq.convert import quantize_model
from hfq.ptq.scheme import Plan
from hfq.runtime.int8.embedding import Int8Embedding
from hfq.runtime.int8.packed import memory_mib
from hfq.runtime.kernels.cpu import multiplies_in_tiles
from hfq.source.checkpoint import Checkpoint, pull
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(16)
FLOAT = ("bert.encoder.layer.0.output.dense", "bert.pooler.dense")
DYNAMIC = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense")
CANDIDATES = {
    "static": Candidate("static"),
    "dynamic": Candidate("dynamic"),
    "mixed": Candidate("static", dynamic_layers=DYNAMIC),
    "float layers": Candidate("static", alpha=0.5, float_layers=FLOAT),
    "float embeddings": Candidate("static"),
    "sharded": Candidate("static"),
}
SAVED_AGAIN = "saved again"
PLANS = [*CANDIDATES, SAVED_AGAIN]

CHILD = """
import json, sys
sys.modules["hfq"] = None  # as if it were not installed: importing it fails
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
columns = load_file("batches.safetensors")  # each [batches, rows, length]
batches = [dict(zip(columns, rows)) for rows in zip(*columns.values())]

def open_all(answers):
    layers = {}
    for name in sys.argv[1:]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
        layers[name] = sorted({type(module).__name__ for module in model.modules()})
        with torch.inference_mode():
            answers[name] = torch.cat([model(**batch).logits for batch in batches])
    return layers

stock, last = {}, {}
layers = {"stock": open_all(stock)}
del sys.modules["hfq"]
import hfq
layers["hfq last"] = open_all(last)
save_file(stock, "stock.safetensors")
save_file(last, "hfq last.safetensors")
print(json.dumps(layers))
"""


@dataclass(frozen=True)
class Exports:
    """Folders by plan, and the float model they come from.

    `models` were loaded with hfq imported first (`conftest.py` does it). `answers` and class names in `layers`: by
    whether hfq was imported ("hfq first", "hfq last", "stock") and by plan.
    """

    work: Path
    float_model: Any
    checkpoint: Checkpoint
    plans: dict[str, Plan]
    models: dict[str, Any]
    answers: dict[str, dict[str, Tensor]]
    layers: dict[str, dict[str, list[str]]]

    def load(self, plan: str, **options: Any) -> Any:
        """A model of its own, to be changed."""
        return AutoModelForSequenceClassification.from_pretrained(self.work / plan, **options)

    def tensors(self, plan: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted((self.work / plan).glob("*.safetensors")):
            found |= load_file(path)
        return found


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    work = tmp_path_factory.mktemp("exports")
    float_model = tiny(hidden_size=128, intermediate_size=512, vocab_size=2000)
    float_model.save_pretrained(work / "float")
    checkpoint = pull(str(work / "float"))
    space = make_space(float_model, BATCHES[:2], smooth=True)
    plans = {name: space.plan(candidate) for name, candidate in CANDIDATES.items()}
    plans["float embeddings"] = Plan(plans["static"].layers, ())
    for name, plan in plans.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "sharded":
                patch.setattr(hfq.export.checkpoint, "SHARD_SIZE", "200KB")
            export(quantize_model(float_model, plan, space.folds), plan, checkpoint, folder=work / name)
    models = {plan: AutoModelForSequenceClassification.from_pretrained(work / plan) for plan in plans}
    answers = {"hfq first": {plan: logits(model, BATCHES) for plan, model in models.items()}}
    models["static"].save_pretrained(work / SAVED_AGAIN)
    models[SAVED_AGAIN] = AutoModelForSequenceClassification.from_pretrained(work / SAVED_AGAIN)
    answers["hfq first"][SAVED_AGAIN] = logits(models[SAVED_AGAIN], BATCHES)
    layers = in_another_process(work)
    answers |= {when: load_file(work / f"{when}.safetensors") for when in layers}
    return Exports(work, float_model, checkpoint, plans, models, answers, layers)


def in_another_process(work: Path) -> dict[str, dict[str, list[str]]]:
    """Open every folder with stock transformers where there is no hfq, then import hfq and open them again."""
    columns = {name: torch.stack([batch[name] for batch in BATCHES]) for name in BATCHES[0]}
    save_file(columns, work / "batches.safetensors")
    child = subprocess.run(
        [stock_python(), "-c", CHILD, *PLANS],
        cwd=work,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("plan", PLANS)
def test_stock_transformers_gives_the_same_answers(exports: Exports, plan: str) -> None:
    stock, ours = exports.answers["stock"][plan], exports.answers["hfq first"][plan]
    assert not {"Int8Linear", "Int8Embedding"} & set(exports.layers["stock"][plan])
    assert len(stock) >= 200
    assert len(set(stock.argmax(1).tolist())) == 3  # answers differ, so that agreeing means something
    assert (stock.argmax(1) == ours.argmax(1)).float().mean() >= (0.96 if multiplies_in_tiles() else 0.99)
    # On the pooler's two dimensions stock makes one dynamic scale of the whole batch, where hfq makes one a row.
    far = 0.05 if plan == "dynamic" or multiplies_in_tiles() else 0.01
    assert (stock - ours).abs().mean() < far * stock.std()


@pytest.mark.parametrize("plan", PLANS)
def test_answers_are_those_of_the_float_model(exports: Exports, plan: str) -> None:
    assert relative_error(exports.answers["hfq first"][plan], logits(exports.float_model, BATCHES)) < 0.1


@pytest.mark.parametrize("plan", PLANS)
def test_int8_kernels_run_whichever_is_imported_first(exports: Exports, plan: str) -> None:
    assert int8_linears(exports.models[plan])
    assert "Int8Linear" in exports.layers["hfq last"][plan]
    # Not to the bit: one had a thread to itself, so the order of float sums may be another.
    assert relative_error(exports.answers["hfq last"][plan], exports.answers["hfq first"][plan]) < 0.02


@pytest.mark.parametrize("plan", ["static", "mixed", "sharded"])
def test_explicit_load_is_the_same_as_from_pretrained(exports: Exports, plan: str) -> None:
    model = hfq.load(exports.work / plan)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    assert torch.equal(logits(model, BATCHES), exports.answers["hfq first"][plan])


def shared_matmuls(model: nn.Module) -> int:
    return sum(layer.shared_matmul is not None for layer in int8_linears(model).values())


def test_loaded_model_is_fused(exports: Exports) -> None:
    layers = int8_linears(exports.models["static"]).values()
    assert sum(layer.post_op == "gelu" for layer in layers) == 2
    assert sum(layer.returns_codes for layer in layers) == 2
    assert shared_matmuls(exports.models["static"]) == 6


def test_first_forward_fuses_and_explicit_load_has_fused(exports: Exports) -> None:
    model = exports.load("static")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model]
    assert shared_matmuls(model) == 0  # a load is no slower than a float model's
    for twin in twins:
        assert torch.equal(logits(twin, BATCHES), exports.answers["hfq first"]["static"])
        assert shared_matmuls(twin) == 6
    assert shared_matmuls(hfq.load(exports.work / "static")) == 6


def test_first_forwards_from_many_threads_answer_as_later_ones(exports: Exports) -> None:
    model = exports.load("static")

    def answer(number: int) -> Tensor:
        batch = BATCHES[number // 2]
        with torch.inference_mode():  # of the whole model, or by way of its parts
            return model(**batch).logits if number % 2 else model.classifier(model.bert(**batch).pooler_output)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, range(2 * len(BATCHES))))
    assert_same(torch.cat(found[1::2]), exports.answers["hfq first"]["static"])  # by plans, or not yet
    assert relative_error(torch.cat(found[::2]), exports.answers["hfq first"]["static"]) < 0.02


class SlowToLookAt(BertForSequenceClassification):
    """Its fusions take as long as a test wants."""

    begun, may_end = threading.Event(), threading.Event()
    ran_in: ClassVar[set[int]] = set()  # threads

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        self.begun.set()
        self.may_end.wait(60)
        return super().dummy_inputs

    def forward(self, **inputs: Tensor) -> Any:
        self.ran_in.add(threading.get_ident())
        return super().forward(**inputs)


def test_a_forward_that_comes_while_the_model_is_being_fused_waits_and_answers_as_later_ones(exports: Exports) -> None:
    model = SlowToLookAt.from_pretrained(exports.work / "static")

    def answer() -> Tensor:
        with torch.inference_mode():
            return model(**BATCHES[0]).logits

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answer)
        assert SlowToLookAt.begun.wait(PATIENCE)
        second = pool.submit(answer)
        assert not wait([second], timeout=1).done
        assert not SlowToLookAt.ran_in
        SlowToLookAt.may_end.set()
        found = [first.result(), second.result()]
    assert len(SlowToLookAt.ran_in) == 2
    assert_same(found[0], found[1])
    assert_same(found[1], answer())


def test_unknown_fusion_is_refused_when_the_model_is_loaded(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", "atention")
    with pytest.raises(UsageError, match="HFQ_FUSIONS names 'atention'"):
        exports.load("static")


@pytest.mark.parametrize("plan", PLANS)
def test_weights_stay_int8_in_memory(exports: Exports, plan: str) -> None:
    share = memory_mib(exports.models[plan]) / memory_mib(exports.float_model)
    assert share < {"float layers": 0.48, "float embeddings": 0.72}.get(plan, 0.28)
    assert share > 0.24


@pytest.mark.parametrize("plan", CANDIDATES)
def test_plan_decides_what_each_layer_is(exports: Exports, plan: str) -> None:
    model, wanted = exports.models[plan], exports.plans[plan]
    linears = int8_linears(model)
    assert {name: layer.activation for name, layer in linears.items()} == {
        name: scheme.approach for name, scheme in wanted.layers.items()
    }
    assert {name for name, m in model.named_modules() if isinstance(m, Int8Embedding)} == set(wanted.embeddings)
    assert (len(linears), len(wanted.embeddings)) == (
        11 if plan == "float layers" else 13,
        0 if plan == "float embeddings" else 3,
    )


@pytest.mark.parametrize(
    ("missing", "unexpected"),
    [
        (set(), set()),
        ({"bert.encoder.layer.1.output.dense.weight_scale"}, set()),
        (set(), {"bert.encoder.layer.7.output.dense.weight"}),
    ],
    ids=["as exported", "a scale less", "a layer more"],
)
def test_what_a_file_lacks_or_has_too_much_is_reported(
    exports: Exports, tmp_path: Path, missing: set[str], unexpected: set[str]
) -> None:
    tensors = exports.tensors("static")
    for name in missing:
        del tensors[name]
    tensors |= {name: torch.zeros(2, 2) for name in unexpected}
    shutil.copy(exports.work / "static" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, found = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert (found["missing_keys"], found["unexpected_keys"]) == (missing, unexpected)
    assert len(int8_linears(model)) == 13


def test_layers_kept_in_float_keep_their_weights(exports: Exports) -> None:
    model = exports.models["float layers"]
    for name in ("bert.pooler.dense", "classifier"):
        layer, original = model.get_submodule(name), exports.float_model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, original.weight)
        assert torch.equal(layer.bias, original.bias)


def test_sharded_export_is_in_several_files(exports: Exports) -> None:
    folder = exports.work / "sharded"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert set(index["weight_map"]) == set(exports.tensors("sharded"))
    assert same(exports.tensors("sharded"), exports.tensors("static"))


def test_saving_a_loaded_model_writes_an_equal_checkpoint(exports: Exports) -> None:
    assert same(exports.tensors(SAVED_AGAIN), exports.tensors("static"))
    before, after = (json.loads((exports.work / plan / "config.json").read_text()) for plan in ("static", SAVED_AGAIN))
    schemes = [CompressedTensorsConfig(**config.pop("quantization_config")).to_dict() for config in (before, after)]
    assert schemes[0] == schemes[1]
    assert after == before


@pytest.mark.parametrize("plan", ["dynamic", "mixed", "float layers", "float embeddings", "sharded"])
def test_saving_any_plan_keeps_its_tensors(exports: Exports, plan: str, tmp_path: Path) -> None:
    exports.models[plan].save_pretrained(tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), exports.tensors(plan))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, BATCHES), exports.answers["hfq first"][plan])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize("plan", ["static", "dynamic"])
def test_copies_of_a_loaded_model_answer_alike(exports: Exports, plan: str) -> None:
    model = exports.models[plan]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, BATCHES), exports.answers["hfq first"][plan])
        assert memory_mib(twin) == memory_mib(model)


def pickled(model: nn.Module) -> bytes:
    return pickle.dumps(model)


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("write", [pickled, saved, cloudpickle.dumps], ids=["pickle", "torch.save", "cloudpickle"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_pickle_holds_the_weights_once(
    exports: Exports, write: Callable[[nn.Module], bytes], forwards: int, tmp_path: Path
) -> None:
    folder = shutil.copytree(exports.work / "static", tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for _ in range(forwards):
        logits(model, BATCHES[:1])
    shutil.rmtree(folder)
    content = write(model)
    assert len(content) <= 1.2 * size
    twin = torch.load(io.BytesIO(content), weights_only=False) if write is saved else pickle.loads(content)
    assert torch.equal(logits(twin, BATCHES), exports.answers["hfq first"]["static"])


@pytest.mark.parametrize("plan", ["static", "dynamic"])
def test_state_can_be_saved_by_torch(exports: Exports, plan: str, tmp_path: Path) -> None:
    torch.save(exports.load(plan).state_dict(), tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt"), exports.tensors(plan))


def test_loaded_model_moves_into_shared_memory(exports: Exports) -> None:
    model = exports.load("static").share_memory()
    assert all(tensor.is_shared() for tensor in model.state_dict().values())
    assert torch.equal(logits(model, BATCHES), exports.answers["hfq first"]["static"])


def test_process_that_is_started_takes_a_model_and_is_sent_another(exports: Exports) -> None:
    model = exports.load("static")
    expected = logits(model, BATCHES[:2])  # packed now: the plain weights are made for the pickle alone
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=logits, initargs=(model, BATCHES[:1])) as pool:
        found = [pool.submit(logits, sent, BATCHES[:2]).result() for sent in (model, exports.load("static"))]
    assert all(torch.equal(answer, expected) for answer in found)
    assert torch.equal(logits(model, BATCHES[:2]), expected)


def test_bfloat16_is_as_good(exports: Exports) -> None:
    model = exports.load("static", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert int8_linears(model)
    assert relative_error(logits(model, BATCHES), logits(exports.float_model, BATCHES)) < 0.1


def test_loaded_model_can_be_cast(exports: Exports) -> None:
    model = exports.load("static").to(torch.bfloat16)
    assert relative_error(logits(model, BATCHES), logits(exports.float_model, BATCHES)) < 0.1


def test_loaded_model_takes_the_tensors_of_another(exports: Exports) -> None:
    other = tiny(seed=1, hidden_size=128, intermediate_size=512, vocab_size=2000)
    for name, parameter in other.named_parameters():
        if "intermediate" in name:
            parameter *= 3
    space = make_space(other, BATCHES[:2])
    quantized = quantize_model(other, space.plan(Candidate("static")), space.folds)
    model = exports.load("static")
    model.load_state_dict(quantized.state_dict())
    assert relative_error(logits(model, BATCHES), logits(quantized, BATCHES)) < ROUNDING


PARTS = ("bert.embeddings", "bert.encoder", "bert.pooler", "classifier")
CHOSEN = ("auto", "balanced", "balanced_low_0", "sequential")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers chooses the accelerator")
@pytest.mark.parametrize(
    "device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, dict.fromkeys(PARTS, "cpu"), *CHOSEN], ids=str
)
def test_device_map_of_the_cpu_runs_int8(exports: Exports, device_map: Any, tmp_path: Path) -> None:
    model = exports.load("static", device_map=device_map, offload_folder=tmp_path, dtype="auto", low_cpu_mem_usage=True)
    assert len(int8_linears(model)) == 13
    assert torch.equal(logits(model, BATCHES), exports.answers["hfq first"]["static"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers chooses the accelerator")
@pytest.mark.parametrize(
    "options",
    [{"device_map": {**dict.fromkeys(PARTS, "cpu"), "bert.encoder": "disk"}}, {"max_memory": {"cpu": "300KB"}}],
    ids=["named", "too little memory"],
)
def test_int8_weights_on_disk_are_refused(exports: Exports, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r'part of this int8 model on disk.* Pass device_map="cpu"'):
        exports.load("static", **{"device_map": "auto", "offload_folder": tmp_path, **options})
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_of_a_loaded_model_keeps_its_size(exports: Exports) -> None:
    model = exports.load("static")
    embedding = model.get_input_embeddings()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert same.resize_token_embeddings(embedding.num_embeddings) is same.get_input_embeddings()
        with pytest.raises(UnsupportedError, match=r"keeps its \d+ tokens. Resize the float checkpoint's"):
            same.resize_token_embeddings(embedding.num_embeddings + 8)


@pytest.mark.parametrize("plan", ["static", "float embeddings"])
def test_embeddings_are_found_by_a_parameter_with_a_row_for_each_token(exports: Exports, plan: str) -> None:
    """As peft does for prompts, which come before the embedded tokens and are trained."""
    model = exports.load(plan)
    rows = model.config.vocab_size
    name = next(name for name, parameter in model.bert.named_parameters() if len(parameter) == rows)
    embeddings = copy.deepcopy(model).bert.get_submodule(name.replace(".weight", ""))
    ids = BATCHES[0]["input_ids"]
    assert torch.equal(embeddings(ids), model.get_input_embeddings()(ids))


def test_trainer_evaluates_and_predicts_but_refuses_to_train(exports: Exports, tmp_path: Path) -> None:
    model = exports.load("static")
    rows = [dict(zip(BATCHES[0], row, strict=True), labels=0) for row in zip(*BATCHES[0].values(), strict=True)]
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    found = torch.tensor(trainer.predict(rows).predictions)
    assert relative_error(found, exports.answers["hfq first"]["static"][: len(rows)]) < 0.02  # in batches of eight
    loss = nn.functional.cross_entropy(found, torch.zeros(len(rows), dtype=torch.long)).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-3)
    with pytest.raises(UnsupportedError, match=r"int8 model is not trained.* Train the float checkpoint"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantizing_on_request_gives_a_float_model(exports: Exports) -> None:
    model = exports.load("static", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert not int8_linears(model)
    assert relative_error(logits(model, BATCHES), logits(exports.float_model, BATCHES)) < 0.1


def mappings() -> dict[range, str]:
    """What /proc says of each stretch of memory, by its addresses."""
    texts = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return {range(*(int(end, 16) for end in text.split()[0].split("-"))): text for text in texts}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("plan", ["static", "sharded"])
def test_loaded_model_keeps_its_file_where_other_processes_share_it(exports: Exports, plan: str) -> None:
    model = exports.load(plan)
    logits(model, BATCHES)
    address = model.bert.embeddings.word_embeddings.weight.data_ptr()
    (held,) = [text for addresses, text in mappings().items() if address in addresses]
    assert str(exports.work / plan) in held
    assert re.search(r"^Private_Dirty: +0 kB", held, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_file_is_read_into_memory_on_request(exports: Exports) -> None:
    model = exports.load("static", disable_mmap=True)
    files = [addresses for addresses, text in mappings().items() if ".safetensors" in text]
    assert not [name for name, p in model.named_parameters() if any(p.data_ptr() in file for file in files)]
    assert torch.equal(logits(model, BATCHES), exports.answers["hfq first"]["static"])


def test_float_checkpoint_is_not_loaded_as_int8(exports: Exports) -> None:
    with pytest.raises(UnsupportedError, match=r"no layer that runs in int8.* `hfq quantize`"):
        hfq.load(exports.work / "float")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{tmp_path}/none does not exist"):
        hfq.load(tmp_path / "none")


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "numpy", "compressed_tensors", "huggingface_hub", "pydantic"]
    code = f"import sys, hfq; assert hfq.__version__; sys.exit(' '.join(sys.modules.keys() & set({heavy})) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        hfq.quantise  # noqa: B018


@pytest.fixture
def bad_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A disk that spoils what safetensors writes, in the way that is put into the dict."""
    how: dict[str, Any] = {}

    def write(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save_file(how.get("keep", lambda x: x)(tensors), path, **options)
        content = bytearray(path.read_bytes())
        if "flip" in how:
            content[how["flip"]] ^= 1
        path.write_bytes(content[: how.get("size")])

    monkeypatch.setattr(hfq.export.checkpoint, "save_file", write)
    return how


def test_good_disk_passes(exports: Exports, tmp_path: Path, bad_disk: dict[str, Any]) -> None:
    export_to(tmp_path / "out", exports)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("position", [-1, -100_000, -300_000])
def test_flipped_bit_on_disk_is_noticed(
    exports: Exports, tmp_path: Path, bad_disk: dict[str, Any], position: int
) -> None:
    bad_disk["flip"] = position
    with pytest.raises(ExportError, match=r"does not read back what was written: \S+ differs. Check the disk"):
        export_to(tmp_path / "out", exports)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_lost_tensor_is_noticed(exports: Exports, tmp_path: Path, bad_disk: dict[str, Any]) -> None:
    bad_disk["keep"] = lambda tensors: dict(list(tensors.items())[1:])
    with pytest.raises(ExportError, match="does not hold the tensors"):
        export_to(tmp_path / "out", exports)


def test_truncated_file_is_noticed(exports: Exports, tmp_path: Path, bad_disk: dict[str, Any]) -> None:
    bad_disk["size"] = 100_000
    with pytest.raises(ExportError):
        export_to(tmp_path / "out", exports)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_nan_is_written_as_it_is(exports: Exports, tmp_path: Path) -> None:
    model = copy.deepcopy(exports.float_model)
    model.bert.embeddings.LayerNorm.bias[0] = torch.nan
    plan = exports.plans["static"]
    export(quantize_model(model, plan, ()), plan, exports.checkpoint, folder=tmp_path / "out")


def test_folder_that_cannot_be_made_is_an_export_error(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export_to(tmp_path / "file" / "out", exports)


def export_to(folder: Path, exports: Exports) -> None:
    plan = exports.plans["static"]
    export(quantize_model(exports.float_model, plan, ()), plan, exports.checkpoint, folder=folder)


def test_embedding_of_another_class_stays_float(tmp_path: Path) -> None:
    model = tiny("RoFormer")  # its positions are a subclass of nn.Embedding with another forward
    model.save_pretrained(tmp_path / "float")
    plan = make_space(model, BATCHES[:1]).plan(Candidate("static"))
    batches = [{name: tensor % 200 for name, tensor in batch.items()} for batch in BATCHES[:1]]
    quantized = quantize_model(model, plan, ())
    export(quantized, plan, pull(str(tmp_path / "float")), folder=tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert relative_error(logits(loaded, batches), logits(quantized, batches)) < 0.02
