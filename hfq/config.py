"""The vocabulary of Intel Neural Compressor's post-training quantization, as its users know it.

Every keyword does what its docstring says or is refused with the reason; none is accepted and ignored. Two defaults
come from the page this library grew from: a tolerable loss of 0.01, and at most 600 trials.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ptq.observers import OBSERVERS
from .tuning.options import ALPHAS, Alpha, Limits, Objective, Options, Rule
from .tuning.search_orders import ORDERS

APPROACHES = {
    "static": "static",
    "dynamic": "dynamic",
    "auto": "auto",
    "post_training_static_quant": "static",
    "post_training_dynamic_quant": "dynamic",
    "post_training_auto_quant": "auto",
}
OBJECTIVES = ("performance", "modelsize", "footprint", "accuracy")
QUANT_LEVELS = ("auto", 0, 1)
ALGORITHMS = {  # Neural Compressor's names of observers, beside hfq's own
    "minmax": "min-max",
    "kl": "entropy",
    "percentile": "percentile-99.99",
    "placeholder": "min-max",
} | {name: name for name in OBSERVERS}
FLOATS = ("fp32",)
INT8 = ("int8", "uint8")
REFUSED_RECIPES = {
    "layer_wise_quant": "hfq shares the float model's memory instead",
    "pre_post_process_quantization": "it rewrites ONNX graphs",
    "gemm_to_matmul": "it rewrites ONNX graphs",
    "graph_optimization_level": "it is an ONNX Runtime option",
    "add_qdq_pair_to_weight": "it is about ONNX graphs",
    "optypes_to_exclude_output_quant": "it is about ONNX graphs",
    "dedicated_qdq_pair": "it is about ONNX graphs",
    "rtn_args": "it is for weight-only 4-bit models",
    "awq_args": "it is for weight-only 4-bit models",
    "teq_args": "it is for weight-only 4-bit models",
    "autoround_args": "it is for weight-only 4-bit models",
    "gptq_args": "hfq's GPTQ has nothing to set; write gptq=True",
}


@dataclass(frozen=True, kw_only=True)
class AccuracyCriterion:
    """How much worse the int8 model may be.

    Args:
        higher_is_better: whether a larger score of `eval_func` is a better one.
        criterion: "relative" to the float score, or "absolute" points.
        tolerable_loss: the largest loss that is accepted, 0.01 unless told.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.
    """

    higher_is_better: bool = True
    criterion: str = "relative"
    tolerable_loss: float = 0.01

    def __post_init__(self) -> None:
        _of_type("higher_is_better", self.higher_is_better, bool)
        _one_of("criterion", self.criterion, ("relative", "absolute"))
        _of_type("tolerable_loss", self.tolerable_loss, int, float)
        if not 0 <= self.tolerable_loss < float("inf"):
            raise ValueError(f"tolerable_loss is {self.tolerable_loss!r}; expected a number that is not negative.")

    @property
    def relative(self) -> float | None:
        """The tolerable loss of a relative criterion, else None."""
        return self.tolerable_loss if self.criterion == "relative" else None

    @property
    def absolute(self) -> float | None:
        """The tolerable loss of an absolute criterion, else None."""
        return self.tolerable_loss if self.criterion == "absolute" else None


@dataclass(frozen=True, kw_only=True)
class TuningCriterion:
    """How the search goes about it, and when it gives up.

    Args:
        strategy: a name of `hfq.tuning.search_orders.ORDERS`: basic, mse, bayesian, tpe, random, exhaustive or
            conservative. bayesian and tpe need Optuna.
        strategy_kwargs: `seed`, of the random choices of random, bayesian and tpe.
        timeout: seconds of tuning after which no further trial begins; 0 is no limit.
        max_trials: evaluations at most, 600 unless told.
        objective: what decides between trials that meet the goal: "performance" (time of the evaluation),
            "modelsize" (what is saved), "footprint" (parameters and buffers in memory) or "accuracy"; a list of
            these; or Neural Compressor's {"objective": [..], "weight": [..]}. With any but "performance" alone
            the search does not stop at the first trial that meets the goal.

    Raises:
        TypeError, ValueError: a value of the wrong type, or out of range.
    """

    strategy: str = "basic"
    strategy_kwargs: Mapping[str, Any] | None = None
    timeout: float = 0
    max_trials: int = 600
    objective: str | Sequence[str] | Mapping[str, Sequence[Any]] = "performance"

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, tuple(ORDERS))
        _known_keys("strategy_kwargs", self.strategy_kwargs or {}, ("seed",))
        _of_type("strategy_kwargs['seed']", self.seed, int)
        _of_type("timeout", self.timeout, int, float)
        _of_type("max_trials", self.max_trials, int)
        if self.timeout < 0:
            raise ValueError(f"timeout is {self.timeout!r}; expected seconds, or 0 for no limit.")
        if self.max_trials < 1:
            raise ValueError(f"max_trials is {self.max_trials!r}; expected at least 1.")
        self.weights()

    @property
    def seed(self) -> int:
        """Of the random choices."""
        return (self.strategy_kwargs or {}).get("seed", 42)

    def weights(self) -> dict[Objective, float]:
        """The weight of each objective; they sum to 1."""
        named = self.objective
        numbers: Sequence[Any] = ()
        if isinstance(named, Mapping):
            _known_keys("objective", named, ("objective", "weight", "higher_is_better"))
            if "higher_is_better" in named:
                raise ValueError("objective['higher_is_better'] is fixed: less time, size and loss are better.")
            numbers = named.get("weight", ())
            named = named.get("objective", ())
        names: list[Any] = [named] if isinstance(named, str) else list(named)
        for name in names:
            _one_of("objective", name, OBJECTIVES)
        numbers = list(numbers) or [1.0] * len(names)
        if not names or len(numbers) != len(names):
            raise ValueError(f"objective is {self.objective!r}; expected a weight for each of at least one objective.")
        for number in numbers:
            _of_type("objective weight", number, int, float)
            if number < 0:
                raise ValueError(f"An objective has the weight {number!r}; expected none below 0.")
        total = sum(numbers)
        if total == 0:
            raise ValueError("The weights of the objectives are all 0.")
        return {name: number / total for name, number in zip(names, numbers, strict=True)}


@dataclass(frozen=True, kw_only=True)
class PostTrainingQuantConfig:
    """What `hfq.quantization.fit` may do to a model.

    Args:
        approach: "static" (one activation scale, from calibration), "dynamic" (a scale per token, no calibration) or
            "auto" (static first, then dynamic).
        backend: "default", hfq's own kernels. Others are refused: they are other libraries.
        device: "cpu".
        domain: "auto" or "nlp" (SmoothQuant is tried), "cv" or "object_detection" (it is not: it is for transformers).
        calibration_sampling_size: examples to calibrate on, 100 unless told. With several sizes, the next is taken
            when no trial with the one before met the goal.
        op_type_dict, op_name_dict: for layers of a type ("Linear"), or with names that a regular expression matches
            whole, {"weight": {..}, "activation": {..}}. Of both: "dtype" ("int8", "fp32", or a list of what is
            allowed). Of weights: "scheme" ("sym"), "granularity" ("per_channel", "per_tensor"), "algo" ("minmax"). Of
            activations: "scheme" ("asym", "sym"), "granularity" ("per_tensor"; "per_token" is dynamic), "algo"
            ("minmax", "kl", or an observer of hfq). int8 weights with fp32 activations are weight-only. Names win
            over types, later entries over earlier ones.
        excluded_precisions: "fp32" (no sensitive layer is kept in float), "bf16" and "fp16" (never used).
        reduce_range: activations use 7 bits, for CPUs whose int8 sums saturate; hfq detects these when it runs, so
            this is for files that other software runs.
        quant_level: 0 (conservative: from half the layers in float to none, while the goal holds), 1 (the strategy of
            `tuning_criterion`), or "auto", which is 1.
        recipes: "smooth_quant" with "smooth_quant_args" {"alpha": number, list of numbers, or "auto"};
            "fast_bias_correction", "weight_correction", "gptq"; "first_conv_or_matmul_quantization" (True),
            "last_conv_or_matmul_quantization" (False here: the layer that makes the logits stays float, unless it is a
            large part of the model).
        accuracy_criterion, tuning_criterion: the goal and the search.
        example_inputs: a batch, as a dataloader would yield it, that the graph is traced with and that stands in for
            calibration data where the approach is dynamic.

    Raises:
        TypeError, ValueError: naming the keyword, what it holds, and what was expected.
    """

    approach: str = "static"
    backend: str = "default"
    device: str = "cpu"
    domain: str = "auto"
    calibration_sampling_size: int | Sequence[int] = (100,)
    op_type_dict: Mapping[str, Mapping[str, Any]] | None = None
    op_name_dict: Mapping[str, Mapping[str, Any]] | None = None
    excluded_precisions: Sequence[str] = ()
    reduce_range: bool | None = None
    quant_level: str | int = "auto"
    recipes: Mapping[str, Any] | None = None
    accuracy_criterion: AccuracyCriterion = field(default_factory=AccuracyCriterion)
    tuning_criterion: TuningCriterion = field(default_factory=TuningCriterion)
    example_inputs: Any = None

    def __post_init__(self) -> None:
        _one_of("approach", self.approach, tuple(APPROACHES))
        _one_of("backend", self.backend, ("default",), why="other backends are other libraries")
        _one_of("device", self.device, ("cpu",), why="hfq's int8 kernels run on CPUs")
        _one_of("domain", self.domain, ("auto", "nlp", "cv", "object_detection"))
        if not any(self.quant_level is level or self.quant_level == level for level in QUANT_LEVELS) or isinstance(
            self.quant_level, bool
        ):
            raise ValueError(f"quant_level is {self.quant_level!r}; expected 'auto', 0 or 1.")
        if self.reduce_range is not None:
            _of_type("reduce_range", self.reduce_range, bool)
        _of_type("accuracy_criterion", self.accuracy_criterion, AccuracyCriterion)
        _of_type("tuning_criterion", self.tuning_criterion, TuningCriterion)
        if isinstance(self.excluded_precisions, str):
            raise TypeError(f"excluded_precisions is {self.excluded_precisions!r}; expected a list.")
        for precision in self.excluded_precisions:
            _one_of("excluded_precisions", precision, ("bf16", "fp16", "fp32"), why="int8 is what the model is for")
        _ = self.sampling_sizes
        self.options()

    @property
    def sampling_sizes(self) -> list[int]:
        """Numbers of calibration examples, in the order they are tried."""
        given = self.calibration_sampling_size
        sizes = [given] if isinstance(given, int) else list(given)
        for size in sizes:
            _of_type("calibration_sampling_size", size, int)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"calibration_sampling_size is {given!r}; expected one or more numbers of at least 1.")
        return sizes

    def options(self) -> Options:
        """What this lets the search try."""
        recipes = _recipes(self.recipes or {})
        tuning = self.tuning_criterion
        rules = [*_rules("op_type_dict", self.op_type_dict), *_rules("op_name_dict", self.op_name_dict)]
        return Options(
            approach=APPROACHES[self.approach],
            order="conservative" if self.quant_level == 0 else tuning.strategy,
            alphas=_alphas(recipes, self.domain),
            rules=rules,
            reduce_range=bool(self.reduce_range),
            bias_correction=recipes.get("fast_bias_correction", False),
            weight_correction=recipes.get("weight_correction", False),
            gptq=recipes.get("gptq", False),
            quantize_first=recipes.get("first_conv_or_matmul_quantization", True),
            quantize_last=recipes.get("last_conv_or_matmul_quantization", False),
            keep_float="fp32" not in self.excluded_precisions,
            smooth_always=recipes.get("smooth_quant", False),
            objective=tuning.weights(),
            limits=Limits(tuning.max_trials, tuning.timeout),
            seed=tuning.seed,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizationAwareTrainingConfig:
    """What `hfq.training.prepare_compression` may do to a model that is trained afterwards.

    Args:
        approach: "static", which Neural Compressor's training always is, or "dynamic".
        backend, device, op_type_dict, op_name_dict, excluded_precisions, reduce_range, quant_level, accuracy_criterion,
            tuning_criterion, example_inputs: as of `PostTrainingQuantConfig`. Of layers' rules an observer is not used:
            ranges are observed first, and learned then.

    Raises:
        TypeError, ValueError: naming the keyword, what it holds, and what was expected.
    """

    approach: str = "static"
    backend: str = "default"
    device: str = "cpu"
    op_type_dict: Mapping[str, Mapping[str, Any]] | None = None
    op_name_dict: Mapping[str, Mapping[str, Any]] | None = None
    excluded_precisions: Sequence[str] = ()
    reduce_range: bool | None = None
    quant_level: str | int = "auto"
    accuracy_criterion: AccuracyCriterion = field(default_factory=AccuracyCriterion)
    tuning_criterion: TuningCriterion = field(default_factory=TuningCriterion)
    example_inputs: Any = None

    def __post_init__(self) -> None:
        if self.reduce_range:
            raise ValueError("reduce_range is True; expected False: ranges that are learned take all codes.")
        self.options()

    def options(self) -> Options:
        """What this lets training round."""
        return PostTrainingQuantConfig(**{**vars(self), "recipes": {"smooth_quant": False}}).options()


def _recipes(given: Mapping[str, Any]) -> Mapping[str, Any]:
    switches = (
        "smooth_quant",
        "fast_bias_correction",
        "weight_correction",
        "gptq",
        "first_conv_or_matmul_quantization",
        "last_conv_or_matmul_quantization",
    )
    for name, value in given.items():
        if name in REFUSED_RECIPES:
            raise ValueError(f"recipes[{name!r}] is not for hfq: {REFUSED_RECIPES[name]}.")
        _one_of("recipes key", name, (*switches, "smooth_quant_args"))
        if name in switches:
            _of_type(f"recipes[{name!r}]", value, bool)
    return given


def _alphas(recipes: Mapping[str, Any], domain: str) -> Sequence[Alpha]:
    arguments = recipes.get("smooth_quant_args", {})
    _of_type("recipes['smooth_quant_args']", arguments, Mapping)
    _known_keys("recipes['smooth_quant_args']", arguments, ("alpha",))
    wanted = recipes.get("smooth_quant")
    if arguments and not wanted:
        raise ValueError("recipes['smooth_quant_args'] is given without recipes['smooth_quant'] = True.")
    if wanted is False or (wanted is None and domain in ("cv", "object_detection")):
        return ()
    if "alpha" not in arguments:
        return ALPHAS
    where, alpha = "recipes['smooth_quant_args']['alpha']", arguments["alpha"]
    alphas: list[Any] = [alpha] if isinstance(alpha, int | float | str) else list(alpha)
    for one in alphas:
        if one != "auto" and (isinstance(one, str | bool) or not 0 <= one <= 1):
            raise ValueError(f"{where} is {one!r}; expected 'auto' or a number from 0 to 1.")
    if not alphas:
        raise ValueError(f"{where} is an empty list; expected at least one number.")
    return alphas


def _rules(origin: str, given: Mapping[str, Mapping[str, Any]] | None) -> list[Rule]:
    if given is None:
        return []
    _of_type(origin, given, Mapping)
    return [_rule(f"{origin}[{key!r}]", key, wanted, by_name=origin == "op_name_dict") for key, wanted in given.items()]


def _rule(where: str, key: str, wanted: Mapping[str, Any], *, by_name: bool) -> Rule:
    _of_type(where, wanted, Mapping)
    _known_keys(where, wanted, ("weight", "activation"))
    weight, activation = wanted.get("weight", {}), wanted.get("activation", {})
    for part, keys in (("weight", weight), ("activation", activation)):
        _of_type(f"{where}[{part!r}]", keys, Mapping)
        _known_keys(f"{where}[{part!r}]", keys, ("dtype", "scheme", "granularity", "algo"))
    allowed = _choices(f"{where}['weight']['dtype']", weight.get("dtype"), (*INT8, *FLOATS), (*INT8, *FLOATS))
    inputs = _choices(f"{where}['activation']['dtype']", activation.get("dtype"), (*INT8, *FLOATS), (*INT8, *FLOATS))
    _choices(f"{where}['weight']['scheme']", weight.get("scheme"), ("sym",), ("sym",))
    _choices(f"{where}['weight']['algo']", weight.get("algo"), ("minmax",), ("minmax",))
    grain = _choices(f"{where}['weight']['granularity']", weight.get("granularity"), ("per_channel", "per_tensor"), ())
    scheme = _choices(f"{where}['activation']['scheme']", activation.get("scheme"), ("asym", "sym"), ())
    per = _choices(
        f"{where}['activation']['granularity']", activation.get("granularity"), ("per_tensor", "per_token"), ()
    )
    algo = _choices(f"{where}['activation']['algo']", activation.get("algo"), tuple(ALGORITHMS), ())
    if by_name:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{where}: {key!r} is not a regular expression: {error}.") from error
    int8_weight = any(dtype in INT8 for dtype in allowed)
    if int8_weight and not any(dtype in FLOATS for dtype in allowed):
        precisions: tuple[str, ...] = ("int8",)
    else:
        precisions = ("int8", "fp32") if int8_weight else ("fp32",)
    if "weight" in wanted and "dtype" not in weight and not any(dtype in INT8 for dtype in inputs):
        precisions = ("int8",)
    elif not any(dtype in INT8 for dtype in inputs) and "dtype" not in weight:
        precisions = ("fp32",)  # {"activation": {"dtype": "fp32"}} alone keeps the layer float, as it does there
    approaches: tuple[Any, ...] = ("static", "dynamic", "weight-only")
    if not any(dtype in INT8 for dtype in inputs):
        approaches = ("weight-only",)
    elif per:
        approaches = tuple({"per_tensor": "static", "per_token": "dynamic"}[one] for one in per)
    return Rule(
        pattern=key if by_name else None,
        type_name=None if by_name else key,
        precisions=precisions,
        approaches=approaches,
        observer=ALGORITHMS[algo[0]] if algo else None,
        symmetric=scheme[:1] == ["sym"],
        per_tensor=grain[:1] == ["per_tensor"],
    )


def _choices(where: str, given: Any, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """A value or a list of values, each of which must be known; the first is preferred."""
    if given is None:
        return list(default)
    values = [given] if isinstance(given, str) else list(given)
    for value in values:
        _one_of(where, value, tuple(known))
    if not values:
        raise ValueError(f"{where} is empty; expected one of {', '.join(known)}.")
    return values


def _of_type(name: str, value: Any, *types: type) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(one.__name__ for one in types)
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected {expected}.")


def _one_of(name: str, value: Any, known: tuple[Any, ...], *, why: str = "") -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} is {value!r}, a {type(value).__name__}; expected one of {', '.join(map(repr, known))}."
        )
    if value not in known:
        reason = f" ({why})" if why else ""
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}{reason}.")


def _known_keys(name: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    _of_type(name, value, Mapping)
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has the key {key!r}; expected only {', '.join(known)}.")
