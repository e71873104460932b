"""Whatever a recipe, a config or the header of a weight file holds: it is read, or refused by an `HfqError`.

Never another exception, and never much memory. The examples are the same on every run.
"""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.command import CHECKPOINT, copy_checkpoint

from hfq.common.errors import HfqError, SourceError, UsageError
from hfq.common.safetensors_header import read_header
from hfq.recipe import Recipe, read_recipe
from hfq.report.tables import describe
from hfq.source.checkpoint import pull
from hfq.source.model import load_model
from hfq.tasks.registry import make_task

EXAMPLES = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
MOST_MEMORY = 64 << 20

numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2, 10**9, 10**12, 2**63])
texts = st.text(max_size=12) | st.sampled_from(["re:(a+)+$", "a/b", "../x", "\x00", "{{ 1 }}", "hf_" + "a" * 34])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkpoint(tmp_path_factory.mktemp("fuzz") / "model")


# Recipes


def parsed(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        recipe = read_recipe(path)
    except UsageError as error:
        assert str(path) in str(error)
        return
    assert recipe.name is not None and recipe.output_folder.name is not None


@settings(max_examples=100, **EXAMPLES)
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "token", "x"]), values, max_size=5))
def test_a_recipe_of_any_values_is_read_or_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    parsed(tmp_path / "recipe.yaml", yaml.safe_dump({"checkpoint": "a/b", **keys}))


@settings(max_examples=100, **EXAMPLES)
@example('checkpoint: !!bool "x"')
@example("checkpoint: !!timestamp x")
@given(st.text(st.sampled_from("ab:- \n\t[]{}&*!|>'\"#?,<0_9.=%@\x00\u2028é"), max_size=60))
def test_a_recipe_of_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    parsed(tmp_path / "recipe.yaml", "checkpoint: x\n" + text)
    parsed(tmp_path / "recipe.yaml", text)


# Configs

CONFIG = json.loads((CHECKPOINT / "config.json").read_text())
FORGED = ("quantization_config", "auto_map", "num_labels", "attn_implementation", "text_config", "rope_theta", "x")
changes = st.dictionaries(st.sampled_from([*CONFIG, *FORGED]), values, min_size=1, max_size=3)
quantization = st.fixed_dictionaries(
    {"quant_method": st.just("compressed-tensors")},
    optional={
        "format": values,
        "ignore": st.lists(texts, max_size=3) | values,
        "config_groups": st.dictionaries(
            texts, values | st.fixed_dictionaries({"targets": st.lists(texts, max_size=2) | values}), max_size=2
        ),
    },
)


@settings(max_examples=100, **EXAMPLES)
@given(changes | st.fixed_dictionaries({"quantization_config": quantization}))
def test_a_checkpoint_of_any_config_is_described_or_refused(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    try:
        checkpoint = pull(str(folder), trust_remote_code=True)
        assert json.dumps(describe(checkpoint))
        make_task(checkpoint.config)
    except HfqError as error:
        assert str(error)


@settings(max_examples=40, **EXAMPLES)
@example({"vocab_size": 1 << 23})
@given(st.dictionaries(st.sampled_from(list(CONFIG)), numbers | st.none() | texts, min_size=1, max_size=2))
def test_a_model_of_any_config_is_loaded_or_refused(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    try:
        checkpoint = pull(str(folder))
        model = load_model(checkpoint, "AutoModelForSequenceClassification", trust_remote_code=False)
    except HfqError as error:
        assert str(error)
        return
    held = sum(tensor.elements for tensor in checkpoint.tensors.values())
    assert sum(parameter.numel() for parameter in model.parameters()) <= held
    assert all(isinstance(parameter, torch.Tensor) and not parameter.is_meta for parameter in model.parameters())


# Headers

sizes = st.integers(0, 12) | numbers
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BF16", "F4", "F6_E2M3", "Q"]) | values,
        "shape": st.lists(sizes, max_size=3) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    },
    optional={"x": values},
)
headers = st.dictionaries(texts | st.just("__metadata__"), tensors | values, max_size=3)


@st.composite
def fitting(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header in which all is well, and the length of its data."""
    rows: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text("abc.", min_size=1, max_size=5), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype, itemsize = draw(st.sampled_from([("F32", 4), ("I8", 1), ("BF16", 2), ("F64", 8)]))
        length = int(torch.Size(shape).numel()) * itemsize
        rows[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    return rows, position


def accepted(path: Path, content: bytes) -> bool:
    """Whether `read_header` takes the file. What it takes, safetensors takes."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        found = read_header(path)
    except SourceError as error:
        assert str(path) in str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(found)
        assert all(tuple(file.get_slice(name).get_shape()) == tensor.shape for name, tensor in found.items())
    return True


def content_of(header: bytes, data: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + b"\0" * data


@settings(max_examples=100, **EXAMPLES)
@given(fitting())
def test_a_header_that_fits_is_accepted(tmp_path: Path, file: tuple[dict[str, Any], int]) -> None:
    rows, data = file
    assert accepted(tmp_path / "model.safetensors", content_of(json.dumps(rows).encode(), data))


@settings(max_examples=120, **EXAMPLES)
@given(headers, st.integers(0, 40))
def test_a_header_of_any_values_is_accepted_or_refused(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    accepted(tmp_path / "model.safetensors", content_of(json.dumps(header).encode(), data))


@settings(max_examples=120, **EXAMPLES)
@given(fitting(), st.data())
def test_a_header_with_a_byte_changed_is_accepted_or_refused(
    tmp_path: Path, file: tuple[dict[str, Any], int], data: st.DataObject
) -> None:
    content = bytearray(content_of(json.dumps(file[0]).encode(), file[1]))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    accepted(tmp_path / "model.safetensors", bytes(content))


@settings(max_examples=100, **EXAMPLES)
@given(st.binary(max_size=64))
def test_a_file_of_any_bytes_is_accepted_or_refused(tmp_path: Path, content: bytes) -> None:
    accepted(tmp_path / "model.safetensors", content)
