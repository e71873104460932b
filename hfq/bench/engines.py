"""The runtimes that `hfq bench` compares. Each is loaded in a process of its own, and what it needs made first in another.

A peer is quantized as its own guide says, from the float checkpoint, with the same calibration inputs for all.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Checkpoint = Literal["quantized", "baseline"]
Run = Callable[[Tensor, Tensor], Tensor]  # input_ids and attention_mask int64 [batch, length] to float [batch, …]
INPUTS = ("input_ids", "attention_mask")
WEIGHTS = (".safetensors", ".bin", ".xml", ".onnx", ".pt")


@dataclass(frozen=True)
class Job:
    """`quantized` and `baseline`: the int8 checkpoint and the float one it was made from. `calibration`: a file of input ids.

    `layers`: load so many of the model's layers only; None for all. `embeds`: it is sentence-transformers' model of
    vectors, which runs whole: from tokens to vectors.
    """

    quantized: Path
    baseline: Path
    auto_class: str
    calibration: Path
    threads: int
    layers: int | None = None
    embeds: bool = False


class Engine(Protocol):
    """One runtime. `requires`: modules that must be installed. `loads`: the checkpoint that it loads as it is, or None:
    then it is `Preparing`.
    """

    requires: tuple[str, ...]
    loads: Checkpoint | None

    def load(self, path: Path, job: Job) -> Run:
        """Load the checkpoint, or what `prepare` made. This is what "load time" means."""


class Preparing(Engine, Protocol):
    """One that quantizes into files of its own."""

    def prepare(self, job: Job, folder: Path) -> None:
        """Make in `folder` what is loaded. The size of its weights is reported."""


class TorchFloat:
    """The float checkpoint in eager mode, as a user without any of this runs it."""

    requires: tuple[str, ...] = ()
    loads: Checkpoint | None = "baseline"

    def load(self, path: Path, job: Job) -> Run:
        return _answering(_model(path, job))


class Hfq:
    """The int8 checkpoint through `from_pretrained`, with hfq imported."""

    requires: tuple[str, ...] = ()
    loads: Checkpoint | None = "quantized"

    def load(self, path: Path, job: Job) -> Run:
        import hfq.runtime.loading.quantizer  # noqa: F401

        return _answering(_model(path, job))


class HfqCompiled(Hfq):
    """The same, through `hfq.compile`."""

    def load(self, path: Path, job: Job) -> Run:
        from hfq.runtime.compiling.compile import compile

        return _answering(compile(_model(path, job)))


class OpenVino:
    """NNCF post-training quantization for transformers, run by OpenVINO with its latency hint."""

    requires: tuple[str, ...] = ("openvino", "nncf")
    loads: Checkpoint | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        import nncf
        import openvino
        import torch

        example = _example(job)
        with torch.no_grad():
            graph = openvino.convert_model(_Positional(_model(job.baseline, job)), example_input=example)
        samples = [{name: value.numpy() for name, value in _inputs(ids).items()} for ids in _calibration(job)]
        quantized = nncf.quantize(
            graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
        openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    def load(self, path: Path, job: Job) -> Run:
        import openvino
        import torch

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads}
        request = openvino.Core().compile_model(path / "model.xml", "CPU", settings).create_infer_request()

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            answers = request.infer({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            return torch.from_numpy(answers[0])

        return run


class OnnxRuntime:
    """ONNX Runtime's dynamic quantization, which its guide advises for transformers, of the graph that its tool optimizes."""

    requires: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    loads: Checkpoint | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers.optimizer import optimize_model

        model = _Positional(_model(job.baseline, job))
        exported = folder / "float.onnx"
        torch.onnx.export(
            model,
            tuple(_example(job).values()),
            str(exported),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(INPUTS, _dimensions(model)),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        config: Any = model.config
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimize_model(str(exported), model_type="bert", opt_level=0, **sizes).save_model_to_file(str(exported))
        quantize_dynamic(exported, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
        exported.unlink()

    def load(self, path: Path, job: Job) -> Run:
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            return torch.from_numpy(session.run(None, feeds)[0])

        return run


class TorchDynamic:
    """torch's own dynamic int8, the eager mode that upstream retires: every Linear of the float checkpoint.

    It quantizes after loading, as torchao does.
    """

    requires: tuple[str, ...] = ()
    loads: Checkpoint | None = "baseline"

    def load(self, path: Path, job: Job) -> Run:
        import torch
        from torch.ao.quantization import quantize_dynamic

        torch.backends.quantized.engine = "onednn"
        return _answering(quantize_dynamic(_model(path, job), {nn.Linear}, dtype=torch.qint8))


class TorchAo:
    """torchao's dynamic int8 activations and int8 weights, compiled, which is how its guide runs them."""

    requires: tuple[str, ...] = ("torchao",)
    loads: Checkpoint | None = "baseline"

    def load(self, path: Path, job: Job) -> Run:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = _model(path, job)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return _answering(_compiled(model))


class SentenceOnnx:
    """sentence-transformers' ONNX backend, with its dynamic int8 for this kind of CPU."""

    requires: tuple[str, ...] = ("sentence_transformers", "onnxruntime", "optimum.onnxruntime")
    loads: Checkpoint | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

        model = SentenceTransformer(_float_copy(job, folder), backend="onnx", device="cpu")
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(folder), file_suffix="int8")
        _without_float(folder)

    def load(self, path: Path, job: Job) -> Run:
        import onnxruntime
        from sentence_transformers import SentenceTransformer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        settings = {"file_name": "model_int8.onnx", "session_options": options, "provider": "CPUExecutionProvider"}
        return _answering(SentenceTransformer(str(path), backend="onnx", device="cpu", model_kwargs=settings))


class SentenceOpenVino:
    """sentence-transformers' OpenVINO backend, with its static int8."""

    requires: tuple[str, ...] = ("sentence_transformers", "openvino", "optimum.intel", "datasets")
    loads: Checkpoint | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        import csv

        from optimum.intel import OVQuantizationConfig
        from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

        model = SentenceTransformer(_float_copy(job, folder), backend="openvino", device="cpu")
        texts = folder / "texts"
        texts.mkdir()
        inputs = [ids[0] for ids in _calibration(job)]
        with (texts / "train.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in model.tokenizer.batch_decode(inputs))])
        export_static_quantized_openvino_model(
            model, OVQuantizationConfig(num_samples=len(inputs)), str(folder), file_suffix="int8",
            dataset_name=str(texts), dataset_config_name="default", dataset_split="train", column_name="text",
        )  # fmt: skip
        _without_float(folder)

    def load(self, path: Path, job: Job) -> Run:
        from sentence_transformers import SentenceTransformer

        threads = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads}
        settings = {"file_name": "openvino_model_int8.xml", "ov_config": threads}
        return _answering(SentenceTransformer(str(path), backend="openvino", device="cpu", model_kwargs=settings))


class NeuralCompressor:
    """Neural Compressor's static quantization (PT2E for x86), with its defaults, compiled as its guide says."""

    requires: tuple[str, ...] = ("neural_compressor.torch.quantization", "torchao")
    loads: Checkpoint | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        import torch
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

        model, example = _Positional(_model(job.baseline, job)), tuple(_example(job).values())
        graph = export(model, example_inputs=example, dynamic_shapes=dict.fromkeys(INPUTS, _dimensions(model)))
        prepared = prepare(graph, get_default_static_config())
        with torch.no_grad():
            for ids in _calibration(job):
                prepared(**_inputs(ids))
        convert(prepared).save(example, output_dir=str(folder))

    def load(self, path: Path, job: Job) -> Run:
        from neural_compressor.torch.quantization import load

        return _compiled(load(str(path)))


REFERENCE = "fp32"
ENGINES: dict[str, Engine] = {
    REFERENCE: TorchFloat(),
    "hfq": Hfq(),
    "hfq-compiled": HfqCompiled(),
    "openvino": OpenVino(),
    "onnxruntime": OnnxRuntime(),
    "torch": TorchDynamic(),
    "torchao": TorchAo(),
    "inc": NeuralCompressor(),
    "st-onnx": SentenceOnnx(),
    "st-openvino": SentenceOpenVino(),
}
OF_EMBEDDINGS = ("st-onnx", "st-openvino")  # they run sentence-transformers' models of vectors, and nothing else
PEERS = tuple(name for name in ENGINES if name not in (REFERENCE, "hfq", "hfq-compiled"))


def missing(name: str) -> list[str]:
    """Packages that an engine needs and that are not installed."""
    packages = [module.partition(".")[0] for module in ENGINES[name].requires]
    return [package for package in packages if importlib.util.find_spec(package) is None]


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that the engines called `names` need."""
    packages = {module.partition(".")[0] for name in names for module in ENGINES[name].requires}
    distributions = importlib.metadata.packages_distributions()
    found = {name for package in packages for name in distributions.get(package, ())}
    return {name: importlib.metadata.version(name) for name in sorted(found)}


class _Positional(nn.Module):
    """A model with positional tensors in and one tensor out, as exporters want it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "transformers_model", model).config
        self.run = _answering(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(input_ids, attention_mask)


def _model(path: Path, job: Job) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    os.environ["HFQ_COMPILE"] = "off"  # what is compiled has a row of its own
    if job.embeds:
        from sentence_transformers import SentenceTransformer

        found = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        return found.eval().requires_grad_(False)
    size = {} if job.layers is None else {"num_hidden_layers": job.layers}
    model = getattr(transformers, job.auto_class).from_pretrained(path, dtype=torch.float32, **size)
    return model.eval().requires_grad_(False)


def _float_copy(job: Job, folder: Path) -> str:
    """A folder of the float model in float32, whatever its own type, which exporters read."""
    copy = folder / "float"
    _model(job.baseline, job).save(str(copy))
    return str(copy)


def _without_float(folder: Path) -> None:
    """Keep of the copy what is beside its weights: an exported model is loaded with that."""
    for file in (folder / "float").rglob("*"):
        if file.is_file() and file.suffix not in WEIGHTS:
            place = folder / file.relative_to(folder / "float")
            place.parent.mkdir(exist_ok=True)
            file.replace(place)
    shutil.rmtree(folder / "float")


def _compiled(model: Any) -> Any:
    """torch.compile for each shape, with constant weights."""
    import torch
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 64  # shapes; beyond it the model would run as it is, without a word
    torch._inductor.config.freezing = True  # or weights are not packed, and some are quantized in every forward
    return torch.compile(model, dynamic=False)


def _calibration(job: Job) -> list[Tensor]:
    from safetensors.torch import load_file

    return list(load_file(job.calibration).values())


def _answering(model: Any) -> Run:
    """What `model` puts out first: logits, those of where an answer starts, of one choice, or vectors."""
    if hasattr(model, "transformers_model"):
        return lambda ids, mask: model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
    if str((getattr(model.config, "architectures", None) or [""])[0]).endswith("ForMultipleChoice"):
        return lambda ids, mask: model(input_ids=ids[:, None], attention_mask=mask[:, None], return_dict=True).logits
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask, return_dict=True).to_tuple()[0]


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    import torch

    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _dimensions(model: _Positional) -> dict[int, Any]:
    """Batch and length of an exported model's inputs: any that it takes."""
    import torch

    longest = getattr(model.config, "max_position_embeddings", 512)
    return {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=min(512, longest))}


def _example(job: Job) -> dict[str, Tensor]:
    """Two rows: whatever is exported takes a size of 1 for a constant."""
    return _inputs(_calibration(job)[0].repeat(2, 1))
