"""A sentence-transformers model stays one: in memory, as a folder that stock sentence-transformers opens, and compiled."""

import json
import pickle
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from support.command import CHECKPOINT, stock_python
from support.models import int8_linears, relative_error
from support.trained.training import messages
from transformers import CompressedTensorsConfig

import hfq
from hfq.config import PostTrainingQuantConfig
from hfq.export.checkpoint import export
from hfq.quantization import fit
from hfq.runtime.fusion.encoder_layer import EncoderLayer
from hfq.runtime.int8.linear import Int8Linear
from hfq.runtime.loading.stock import stock_transformers
from hfq.source.checkpoint import pull

MINILM = Path(__file__).parents[2] / "shared" / "checkpoints" / "minilm-l6-embedding"
TEXTS = messages("validation", 40)
PAIRS = list(zip(TEXTS[:20], TEXTS[20:], strict=True))
CONFIG = PostTrainingQuantConfig(approach="static", recipes={"smooth_quant": False})
PROMPTS = {"query": "find: ", "document": ""}

CHILD = """
import json, sys
sys.modules["hfq"] = None  # as if it were not installed: importing it fails
import numpy, sentence_transformers, torch
torch.set_num_threads(1)
texts, folders = json.load(sys.stdin)
for kind, folder in folders.items():
    model = getattr(sentence_transformers, kind)(folder, device="cpu")
    numpy.save(f"{folder}.npy", numpy.asarray(answer(model, texts)))
"""


def answer(model: Any, texts: list[str]) -> np.ndarray:
    """Rows of float32: embeddings, or the scores of pairs, one a row."""
    if hasattr(model, "predict"):
        return model.predict(list(zip(texts[:20], texts[20:], strict=True)))[:, None]
    found = model.encode(texts, convert_to_tensor=True)
    return (found.to_dense() if found.is_sparse else found).float().numpy()


ANSWER = """
def answer(model, texts):
    if hasattr(model, "predict"):
        return model.predict(list(zip(texts[:20], texts[20:], strict=True)))[:, None]
    found = model.encode(texts, convert_to_tensor=True)
    return (found.to_dense() if found.is_sparse else found).float().numpy()
"""


def transformer(folder: Path, head: str, *, task: str, **config: Any) -> Transformer:
    """A random one of two layers in `folder`, with the demo's tokenizer. Its answers differ by input."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    configuration = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **config)
    getattr(transformers, head)(configuration).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Transformer(str(folder), max_seq_length=64, transformer_task=task)


def sentence_transformer(folder: Path) -> SentenceTransformer:
    first = transformer(folder, "BertModel", task="feature-extraction")
    modules = [first, Pooling(64, pooling_mode="mean"), Dense(64, 32), Normalize()]
    return SentenceTransformer(modules=modules, prompts=PROMPTS, similarity_fn_name="dot", device="cpu")


def cross_encoder(folder: Path) -> CrossEncoder:
    first = transformer(folder, "BertForSequenceClassification", task="sequence-classification", num_labels=1)
    return CrossEncoder(modules=[first], device="cpu", activation_fn=torch.nn.Sigmoid())


def sparse_encoder(folder: Path) -> SparseEncoder:
    first = transformer(folder, "BertForMaskedLM", task="fill-mask", tie_word_embeddings=True)
    return SparseEncoder(modules=[first, SpladePooling("max")], device="cpu")


KINDS: dict[str, Callable[[Path], Any]] = {
    "SentenceTransformer": sentence_transformer,
    "CrossEncoder": cross_encoder,
    "SparseEncoder": sparse_encoder,
}


@dataclass
class Made:
    """By kind: the float model, its int8 version, the folder that was saved of it, and what stock makes of that."""

    floats: dict[str, Any] = field(default_factory=dict)
    int8: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    stock: dict[str, np.ndarray] = field(default_factory=dict)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    work, found = tmp_path_factory.mktemp("sentences"), Made()
    for kind, make in KINDS.items():
        found.floats[kind] = make(work / f"float {kind}")
        batches = [TEXTS[:16], TEXTS[16:32]] if kind != "CrossEncoder" else [PAIRS[:16]]
        with pytest.warns(UserWarning, match="quantized without tuning"):
            found.int8[kind] = fit(found.floats[kind], CONFIG, calib_dataloader=batches)
        found.folders[kind] = str(work / kind)
        found.int8[kind].save(found.folders[kind])
    command, given = [stock_python(), "-c", ANSWER + CHILD], json.dumps([TEXTS, found.folders])
    done = subprocess.run(command, input=given, text=True, check=True, stderr=subprocess.PIPE)
    assert "LOAD REPORT" not in done.stderr  # of tensors for which stock transformers has no place
    found.stock = {kind: np.load(f"{folder}.npy") for kind, folder in found.folders.items()}
    yield found


def alike(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean cosine of rows; of single numbers the correlation."""
    if ours.shape[1] == 1:
        return float(np.corrcoef(ours[:, 0], theirs[:, 0])[0, 1])
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(1) / norms).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_model_is_of_its_class_and_runs_int8(made: Made, kind: str) -> None:
    int8 = made.int8[kind]
    assert isinstance(int8, type(made.floats[kind])) and int8_linears(int8)
    assert int8.transformers_model.forward.is_as_it_was()  # so it runs fused
    assert alike(answer(int8, TEXTS), answer(made.floats[kind], TEXTS)) > 0.98
    assert not any(isinstance(module, Int8Linear) for module in made.floats[kind].modules())


@pytest.mark.parametrize("kind", KINDS)
def test_its_folder_opens_with_and_without_hfq(made: Made, kind: str) -> None:
    opened = type(made.floats[kind])(made.folders[kind], device="cpu")
    assert len(int8_linears(opened)) == len(int8_linears(made.int8[kind]))
    assert next(opened.parameters()).dtype == opened.dtype == opened.transformers_model.dtype == torch.float32
    found = answer(opened, TEXTS)
    assert np.allclose(found, answer(made.int8[kind], TEXTS), atol=1e-5)
    assert alike(found, made.stock[kind]) > 0.99


def test_the_folder_holds_what_the_source_does(made: Made) -> None:
    folder, source = Path(made.folders["SentenceTransformer"]), made.floats["SentenceTransformer"]
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    opened = hfq.load(folder)
    assert type(opened) is SentenceTransformer
    assert (opened.prompts, opened.similarity_fn_name, opened.max_seq_length) == (PROMPTS, "dot", 64)
    assert opened[2].linear.weight.equal(source[2].linear.weight)
    assert isinstance(opened[0].model, transformers.BertModel)


def test_export_of_a_folder_is_a_folder_of_sentence_transformers(made: Made, tmp_path: Path) -> None:
    made.floats["SentenceTransformer"].save(str(tmp_path / "float"))
    int8 = made.int8["SentenceTransformer"]
    export(int8[0].model, int8._hfq_plan, pull(str(tmp_path / "float")), folder=tmp_path / "int8")
    found = answer(SentenceTransformer(str(tmp_path / "int8"), device="cpu"), TEXTS)
    assert np.allclose(found, answer(int8, TEXTS), atol=1e-5)


def test_what_is_loaded_can_be_saved_again(made: Made, tmp_path: Path) -> None:
    for kind in ("SentenceTransformer", "SparseEncoder"):
        opened = type(made.floats[kind])(made.folders[kind], device="cpu")
        opened.save(str(tmp_path / kind))
        again = type(opened)(str(tmp_path / kind), device="cpu")
        assert len(int8_linears(again)) == len(int8_linears(opened))
        assert np.array_equal(answer(again, TEXTS), answer(opened, TEXTS))
        files = [Path(folder) / "model.safetensors" for folder in (made.folders[kind], tmp_path / kind)]
        assert files[0].stat().st_size == pytest.approx(files[1].stat().st_size, rel=0.01)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_float_model_is_given_to_who_asks_for_it(made: Made) -> None:
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    opened = SentenceTransformer(made.folders["SentenceTransformer"], device="cpu", model_kwargs=options)
    assert not int8_linears(opened)
    assert alike(answer(opened, TEXTS), made.stock["SentenceTransformer"]) > 0.9999


def test_callers_of_forward_get_fusions_too(made: Made) -> None:
    opened = SentenceTransformer(made.folders["SentenceTransformer"], device="cpu")
    assert not any(layer.shared_matmul for layer in int8_linears(opened).values())
    opened.encode(TEXTS[:2])
    assert sum(layer.shared_matmul is not None for layer in int8_linears(opened).values()) == 6
    layers = opened[0].model.encoder.layer
    assert all(isinstance(layer.forward, EncoderLayer) for layer in layers)


def test_encode_has_its_own_ways(made: Made) -> None:
    opened, source = (models["SentenceTransformer"] for models in (made.int8, made.floats))
    whole = opened.encode(TEXTS, batch_size=8)
    assert alike(opened.encode(TEXTS, batch_size=3), whole) > 0.9995
    assert alike(opened.encode(TEXTS, prompt_name="query"), source.encode(TEXTS, prompt_name="query")) > 0.98
    assert not np.allclose(opened.encode(TEXTS, prompt_name="query"), whole, atol=1e-3)
    assert np.allclose(opened.encode(TEXTS, truncate_dim=8), whole[:, :8], atol=1e-5)
    assert opened.encode(TEXTS, precision="int8").dtype == np.int8
    rows = torch.as_tensor(whole)
    assert relative_error(opened.similarity(whole, whole), rows @ rows.T) < 1e-5


def test_a_pool_of_processes_is_given_the_model_and_its_class(made: Made) -> None:
    opened = made.int8["SentenceTransformer"]
    work, copy = pickle.loads(pickle.dumps((type(opened)._multi_process_worker, opened)))
    assert work == type(opened)._multi_process_worker
    assert np.allclose(copy.encode(TEXTS[:8]), opened.encode(TEXTS[:8]), atol=1e-5)


@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_a_vector_does_not_depend_on_its_company(made: Made, approach: str) -> None:
    opened = made.int8["SentenceTransformer"]
    if approach == "dynamic":
        with pytest.warns(UserWarning, match="without tuning"):
            opened = fit(made.floats["SentenceTransformer"], PostTrainingQuantConfig(approach=approach))
    together = opened.encode(TEXTS[:32], batch_size=32)
    alone = np.concatenate([opened.encode([text]) for text in TEXTS[:16]])
    features = opened[0].processor(
        TEXTS[:16], padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        padded = opened(dict(features))["sentence_embedding"].numpy()
    for row in range(16):
        for other in (alone, padded):
            assert alike(together[row : row + 1], other[row : row + 1]) > 0.9995


def test_tuning_judges_the_whole_model(made: Made) -> None:
    seen = []

    def score(model: Any) -> float:
        seen.append(type(model))
        return alike(model.encode(TEXTS), answer(made.floats["SentenceTransformer"], TEXTS))

    int8 = fit(made.floats["SentenceTransformer"], CONFIG, calib_func=lambda m: m.encode(TEXTS[:16]), eval_func=score)
    assert seen == [SentenceTransformer, SentenceTransformer]  # in float, and one trial
    assert int8.trials[0].accuracy > 0.98


@pytest.mark.skipif(not MINILM.exists(), reason="the checkpoint of all-MiniLM-L6-v2 is not on this machine")
def test_all_minilm_is_near_its_float_vectors_with_and_without_hfq(tmp_path: Path) -> None:
    source = SentenceTransformer(str(MINILM), device="cpu")  # float16
    with pytest.warns(UserWarning, match="without tuning"):
        config = PostTrainingQuantConfig(approach="dynamic", recipes={"smooth_quant": False})
        fit(source, config).save(tmp_path / "int8")
    opened = hfq.load(tmp_path / "int8")
    with stock_transformers():
        stock = SentenceTransformer(str(tmp_path / "int8"), device="cpu")
    found = answer(opened, TEXTS[:16])
    assert alike(found, answer(source.float(), TEXTS[:16])) > 0.99
    assert alike(found, answer(stock, TEXTS[:16])) > 0.99


def test_compile_is_of_the_transformer_inside(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without a compiler it says whom it would have compiled
    monkeypatch.delenv("CXX", raising=False)
    opened = SentenceTransformer(made.folders["SentenceTransformer"], device="cpu")
    with pytest.warns(UserWarning, match="needs a C\\+\\+ compiler"):
        assert hfq.compile(opened) is opened
    assert np.allclose(opened.encode(TEXTS), made.int8["SentenceTransformer"].encode(TEXTS), atol=1e-5)
