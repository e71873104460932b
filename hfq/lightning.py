"""Lightning: quantize a `LightningModule` with its own data and its own validation, or when training ends.

Evaluations are `trainer.validate` or `trainer.test`, so DDP and other strategies evaluate on many devices or hosts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from .common.copies import deep_copy
from .config import PostTrainingQuantConfig
from .quantization import fit

STAGES = ("validate", "test")


def quantize(
    module: LightningModule,
    trainer: Trainer,
    datamodule: LightningDataModule | None = None,
    metric: str = "accuracy",
    conf: PostTrainingQuantConfig | None = None,
    *,
    stage: str = "validate",
) -> Any:
    """An int8 copy of `module`, calibrated on its training data and accepted by what its own validation logs.

    Args:
        datamodule: where the batches come from; the module itself, if it has the dataloaders.
        metric: the name under which the module logs its score.
        conf: the goal and what may be done; `PostTrainingQuantConfig()` when absent.
        stage: "validate" or "test": which of the trainer's loops decides.

    Returns:
        A module of the same class, with `save`, `push_to_hub`, `trials` and `report` (see `hfq.quantization.fit`). If
        it holds one transformers model, that is what `save` writes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; or `metric` is not among what the module logs.
        GoalNotMetError: no trial met the goal.

    Example:
        >>> int8 = hfq.lightning.quantize(module, trainer, datamodule)
        >>> int8.save("./saved_model")
    """
    if not isinstance(module, LightningModule):
        raise TypeError(f"module is {module!r}, a {type(module).__name__}; expected a LightningModule.")
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer is {trainer!r}, a {type(trainer).__name__}; expected a lightning.pytorch.Trainer.")
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}.")
    source = module if datamodule is None else datamodule
    if type(module).forward is LightningModule.forward:
        raise TypeError(f"{type(module).__name__} has no forward, which is what is calibrated. Define it.")
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
    run = trainer.validate if stage == "validate" else trainer.test

    def evaluate(model: LightningModule) -> float:
        return logged(run(model=model, datamodule=datamodule, verbose=False), metric)

    conf = PostTrainingQuantConfig() if conf is None else conf
    return _fit(module, _calibration_loader(source), evaluate, conf)


class QuantizeOnFitEnd(Callback):
    """Exports an int8 copy of the module when training ends, and publishes it where asked.

    `quantized` is the int8 module afterwards. A goal that is missed raises `GoalNotMetError` from `trainer.fit`: the
    trained module and its checkpoints are complete by then.

    Args:
        output: folder for the export.
        metric: the name under which the module's validation logs its score.
        conf: the goal and what may be done; `PostTrainingQuantConfig()` when absent.
        push_to: repository to publish to; nothing is published without it.
        token, private, create_pr: as `push_to_hub` has them.

    Example:
        >>> Trainer(callbacks=[QuantizeOnFitEnd("./int8", metric="accuracy")]).fit(module, datamodule)
    """

    def __init__(  # noqa: PLR0913 - a callback is configured by its arguments, as Lightning's are
        self,
        output: str | Path,
        *,
        metric: str = "accuracy",
        conf: PostTrainingQuantConfig | None = None,
        push_to: str | None = None,
        token: str | None = None,
        private: bool = False,
        create_pr: bool = False,
    ) -> None:
        self.output = Path(output)
        self.metric = metric
        self.conf = PostTrainingQuantConfig() if conf is None else conf
        self.push_to = push_to
        self.publishing: dict[str, Any] = {"token": token, "private": private, "create_pr": create_pr}
        self.quantized: Any = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize on the CPU of the first process; the others wait."""
        if trainer.is_global_zero:
            self._quantize(trainer, pl_module)
        trainer.strategy.barrier()

    def _quantize(self, trainer: Trainer, trained: LightningModule) -> None:
        validation = trainer.val_dataloaders
        if validation is None:
            raise ValueError("QuantizeOnFitEnd needs validation data, and this fit had none.")
        # The trainer that is ending cannot run another loop; this one only evaluates.
        evaluator = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

        def evaluate(model: LightningModule) -> float:
            return logged(evaluator.validate(model=model, dataloaders=validation, verbose=False), self.metric)

        module = deep_copy(trained).cpu()
        module._metric_attributes = None  # metrics by id, of a fit that is not over: the copy's have other ids
        self.quantized = _fit(module, trainer.train_dataloader or validation, evaluate, self.conf)
        self.quantized.save(self.output)
        if self.push_to is not None:
            self.quantized.push_to_hub(self.push_to, **self.publishing)


def logged(results: Any, metric: str) -> float:
    """The score of that name among what a trainer's loop returned, one mapping for each dataloader.

    Raises:
        ValueError: there is none; the message lists what was logged.
    """
    for found in results:
        if metric in found:
            return float(found[metric])
    names = sorted({name for found in results for name in found})
    raise ValueError(f"{metric!r} is not among what the module logs: {', '.join(names) or 'nothing'}.")


def _fit(module: LightningModule, loader: Iterable[Any], evaluate: Any, conf: PostTrainingQuantConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(conf.tuning_criterion.seed)  # training data is shuffled; the same run sees the same slice
        return fit(module, conf, calib_dataloader=loader, eval_func=evaluate)


def _calibration_loader(source: LightningModule | LightningDataModule) -> Iterable[Any]:
    """The training data, so that what decides is not what the scales were made from; else the validation data."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    parent = LightningModule if isinstance(source, LightningModule) else LightningDataModule
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if is_overridden(name, source, parent):
            loader = getattr(source, name)()
            return loader[0] if isinstance(loader, list | tuple) else loader
    raise ValueError(f"{type(source).__name__} has no dataloader to calibrate on. Pass a datamodule.")
