"""Which range int8 covers, for inputs whose distribution is known, and what calibration may not see."""

import pytest
import torch
from support.models import PADDING, tiny, token_batches
from torch import Tensor, nn

from hfq.ptq.calibration import calibrate, encoder_output, sensitivity
from hfq.ptq.convert import int8_linear
from hfq.ptq.observers import OBSERVERS, InputStatistics, Range, affine
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.kernels.kernel import quantize_uint8

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
CLIPPING = ("percentile-99.99", "percentile-99.999", "mse", "entropy")


class OneLayer(nn.Module):
    """A Linear that reads its input as it comes, or with batch and length in one dimension."""

    def __init__(self, features: int, *, flat: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 2)
        self.flat = flat

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x.flatten(0, 1) if self.flat else x)


def observe(*batches: Tensor) -> InputStatistics:
    """What calibration keeps of a layer that reads `batches`, each `[rows, features]`."""
    return calibrate(OneLayer(batches[0].shape[-1]), ["layer"], [{"x": batch} for batch in batches])["layer"]


def normal(rows: int = 400_000, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))


def restored(x: Tensor, covered: Range) -> Tensor:
    """`x` through the int8 codes that cover a range, as the runtime computes them."""
    scheme = LayerScheme.static(covered)
    codes = quantize_uint8(x, scheme.input_scale, scheme.input_zero_point + 128)
    return (codes.float() - (scheme.input_zero_point + 128)) * scheme.input_scale


def squared_error(x: Tensor, covered: Range) -> float:
    return (restored(x, covered) - x).square().mean().item()


@pytest.mark.parametrize("name", CLIPPING)
def test_one_outlier_is_clipped(name: str) -> None:
    x = normal()
    x[0] = 50.0
    low, high = OBSERVERS[name](observe(x))
    assert 2 < high < 49
    assert -6 < low < -2


def test_min_max_covers_the_outlier_at_the_cost_of_all_others() -> None:
    x = normal()
    x[0] = 50.0
    assert OBSERVERS["min-max"](observe(x)) == (x.min().item(), 50.0)
    rest = x[1:]
    tight = OBSERVERS["percentile-99.99"](observe(x))
    assert squared_error(rest, OBSERVERS["min-max"](observe(x))) > 4 * squared_error(rest, tight)


@pytest.mark.parametrize("outlier", [8.0, 50.0, -30.0])
def test_mse_loses_least_of_all_observers(outlier: float) -> None:
    x = normal()
    x[0] = outlier
    stats = observe(x)
    errors = {name: squared_error(x, observer(stats)) for name, observer in OBSERVERS.items()}
    assert errors["mse"] <= 1.02 * min(errors.values())  # it reads a histogram, not the values
    assert errors["mse"] < 0.9 * errors["min-max"]


def test_mse_gives_up_a_far_outlier_among_very_many_values() -> None:
    x = normal()
    x[0] = 50.0
    stats = observe(x)
    stats.histogram = torch.cat([stats.histogram[:-1] * 1000, stats.histogram[-1:]])
    low, high = OBSERVERS["mse"](stats)
    assert low < -3
    assert 3 < high < 8


@pytest.mark.parametrize("name", OBSERVERS)
def test_flat_distribution_is_hardly_clipped(name: str) -> None:
    low, high = OBSERVERS[name](observe(torch.linspace(-3, 5, 100_001)[:, None]))
    assert -3 <= low < -2.9
    assert 4.85 < high <= 5


@pytest.mark.parametrize(("percent", "low", "high"), [(90, -45, 45), (99, -49.5, 49.5), (100, -50, 50)])
def test_percentile_leaves_the_same_share_out_at_both_ends(percent: float, low: float, high: float) -> None:
    percentile = OBSERVERS["percentile-99.99"].func  # type: ignore[attr-defined]
    found = percentile(observe(torch.linspace(-50, 50, 100_001)[:, None]), percent=percent)
    assert found == pytest.approx((low, high), abs=100 / 2048)


def test_moving_average_follows_the_batches_slowly() -> None:
    stats = observe(*(torch.tensor([[-scale], [2 * scale]]) for scale in (1.0, 2.0, 3.0)))
    assert OBSERVERS["min-max"](stats) == (-3.0, 6.0)
    expected = 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3
    assert OBSERVERS["moving-average"](stats) == pytest.approx((-expected, 2 * expected))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    "x",
    [normal(5000).abs() + 5, -normal(5000).abs() - 5, normal(5000).relu(), normal(5000), torch.full((9, 1), -0.25)],
    ids=["positive", "negative", "relu", "both", "constant"],
)
def test_range_holds_zero_and_zero_is_exact(name: str, x: Tensor) -> None:
    low, high = OBSERVERS[name](observe(x))
    assert low <= 0 <= high
    assert restored(torch.zeros(1), (low, high)).item() == 0
    assert x.min().item() <= low or low == 0
    assert x.max().item() >= high or high == 0


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-3, 1e4])
def test_constant_input_comes_back(name: str, value: float) -> None:
    x = torch.full((64, 4), value)
    covered = OBSERVERS[name](observe(x, x))
    assert restored(x, covered) == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize(
    "covered", [(-1.0, 1.0), (0.0, 6.0), (-0.17, 9.3), (-1000.0, 0.0), (-3.3e-3, 2e-4), (-1e-9, 4.0)]
)
def test_round_trip_is_within_half_a_step(covered: Range) -> None:
    low, high = covered
    scale, zero_point = affine(torch.tensor(low), torch.tensor(high))
    assert zero_point.item() == round(zero_point.item())
    assert -128 <= zero_point.item() <= 127
    assert scale.item() == pytest.approx((high - low) / 255)
    x = torch.linspace(low, high, 10_001)
    assert (restored(x, covered) - x).abs().max().item() <= scale.item() * 0.5001


def test_values_outside_the_range_saturate() -> None:
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 7.0, -7.0])
    top, bottom = restored(torch.tensor([2.0, -1.0]), (-1.0, 2.0)).tolist()
    assert restored(x, (-1.0, 2.0)).tolist() == [top, bottom] * 3


def test_batches_add_up_to_one_batch() -> None:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    whole, parts = observe(x), observe(*x.split(37))
    assert torch.equal(whole.channel_min, x.amin(0))
    assert torch.equal(whole.channel_max, x.amax(0))
    assert torch.equal(parts.channel_min, whole.channel_min)
    assert torch.equal(parts.channel_max, whole.channel_max)
    assert torch.equal(parts.histogram, whole.histogram)
    for name in set(OBSERVERS) - {"moving-average"}:
        assert OBSERVERS[name](parts) == OBSERVERS[name](whole)


def test_histogram_counts_every_value_in_its_bin() -> None:
    stats = observe(torch.tensor([[-1.0, 0.0, 0.5], [3.0, 0.5, 0.5]]))
    assert stats.histogram.sum() == 6
    width = 4 / len(stats.histogram)
    values = stats.bin_centers().repeat_interleave(stats.histogram.long())
    assert values.tolist() == pytest.approx([-1, 0, 0.5, 0.5, 0.5, 3], abs=width)


@pytest.mark.parametrize("flat", [False, True], ids=["batch × length", "flattened"])
def test_padding_is_not_observed(flat: bool) -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 2 + [0] * 4, [0] * 3 + [1] * 3])
    huge = x.where(mask[:, :, None].bool(), 1e9)
    model = OneLayer(8, flat=flat)
    padded = calibrate(model, ["layer"], [{"x": huge, "attention_mask": mask}])["layer"]
    clean = observe(x[mask.bool()])
    assert torch.equal(padded.channel_min, clean.channel_min)
    assert torch.equal(padded.channel_max, clean.channel_max)
    assert (padded.average_min, padded.average_max) == (clean.average_min, clean.average_max)
    assert torch.equal(padded.histogram, clean.histogram)


def test_padded_bert_gives_the_statistics_of_its_unpadded_rows() -> None:
    model = tiny()
    words = model.get_input_embeddings().weight
    words[PADDING] = torch.randn(words.shape[1], generator=torch.Generator().manual_seed(0)) * 1e6
    (padded,) = token_batches(1)
    rows = [
        {name: tensor[i : i + 1, : padded["attention_mask"][i].sum()] for name, tensor in padded.items()}
        for i in range(len(padded["input_ids"]))
    ]
    names = [f"bert.encoder.layer.1.{name}" for name in ("attention.self.query", "output.dense")] + [
        "bert.pooler.dense"
    ]
    found, expected = calibrate(model, names, [padded]), calibrate(model, names, rows)
    for name in names:
        assert torch.allclose(found[name].channel_min, expected[name].channel_min, atol=1e-4)
        assert torch.allclose(found[name].channel_max, expected[name].channel_max, atol=1e-4)
        assert found[name].histogram.sum() == expected[name].histogram.sum()
    tokens, width = int(padded["attention_mask"].sum()), words.shape[1]
    assert found[names[0]].histogram.sum() == tokens * width
    assert found["bert.pooler.dense"].histogram.sum() == len(rows) * width  # pooled rows hold no padding
    output = encoder_output(model, [padded])
    assert output.tokens.shape == (tokens, width)
    assert output.first.shape == (len(rows), width)
    assert output.error(encoder_output(model, rows)) < 1e-6


def test_calibration_leaves_no_hooks_and_no_change_behind() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, ["bert.pooler.dense"], token_batches(1))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layer_with_the_coarsest_scale_is_the_most_sensitive() -> None:
    model = tiny()
    batches = token_batches(2)
    names = [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    stats = calibrate(model, names, batches)
    exact, coarse = (
        LayerScheme.static((factor * stats[name].low, factor * stats[name].high))
        for name, factor in zip(names, (1, 20), strict=True)
    )
    twins = {
        name: int8_linear(model.get_submodule(name), scheme)
        for name, scheme in zip(names, (exact, coarse), strict=True)
    }
    found = sensitivity(model, twins, batches)
    assert 0 < found[names[0]] < 1e-3
    assert found[names[1]] > 50 * found[names[0]]
