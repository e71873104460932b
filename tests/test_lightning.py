"""Lightning users: a module is quantized with its own data and its own validation, or when training ends."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from support.command import CHECKPOINT, Done, forkserver, stock_python, write_slice
from support.models import assert_same, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import hfq
import hfq.lightning
from hfq.common.errors import GoalNotMetError
from hfq.config import AccuracyCriterion, PostTrainingQuantConfig
from hfq.hub.local import LocalHub
from hfq.hub.local.server import USER
from hfq.quantization import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*", "ignore:.*isinstance.*")
CONF = PostTrainingQuantConfig(accuracy_criterion=AccuracyCriterion(tolerable_loss=0.2))
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Examples(LightningDataModule):
    """Whether a sequence holds the token 7."""

    def rows(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        ids = torch.randint(5, 30, (count, 10), generator=torch.Generator().manual_seed(seed))
        labels = (ids == 7).any(1).long()
        return [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
            for i, y in zip(ids, labels, strict=True)
        ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows(256, 0), batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows(128, 1), batch_size=32)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.rows(64, 2), batch_size=32)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny(num_labels=2).requires_grad_(True)
        self.right = torchmetrics.Accuracy(task="binary")

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.right.update(self(**batch).logits.argmax(1), batch["labels"])
        self.log("accuracy", self.right, on_epoch=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Regression(LightningModule):
    """Of another kind: pairs, a plain network, a loss to be kept low."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("mse", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def val_dataloader(self) -> DataLoader:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(x, x.sum(1, keepdim=True), strict=True)), batch_size=16)


def test_module_is_quantized_by_its_own_validation(tmp_path: Path) -> None:
    module, data, trainer = Classifier(), Examples(), Trainer(**QUIET)
    baseline = trainer.validate(module, data, verbose=False)[0]["accuracy"]
    int8 = hfq.lightning.quantize(module, trainer, data, conf=CONF)
    assert isinstance(int8, Classifier)
    assert int8.report().baseline.accuracy == pytest.approx(baseline)
    assert trainer.validate(int8, data, verbose=False)[0]["accuracy"] == pytest.approx(int8.trials[-1].accuracy)
    assert int8.report().layers.static[0] == "model.bert.encoder.layer.0.attention.self.query"
    int8.save(tmp_path / "saved")
    batch = {name: value for name, value in next(iter(data.val_dataloader())).items() if name != "labels"}
    with torch.inference_mode():
        expected = int8(**batch).logits
        loaded = hfq.load(tmp_path / "saved")  # the transformers model inside
        assert_same(loaded(**batch).logits, expected)
        again = hfq.load(tmp_path / "saved", model=Classifier())  # the module around it
        assert_same(again(**batch).logits, expected)


def test_saved_module_opens_in_stock_transformers(tmp_path: Path) -> None:
    hfq.lightning.quantize(Classifier(), Trainer(**QUIET), Examples(), conf=CONF).save(tmp_path / "saved")
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A; import torch;"
        "m = A.from_pretrained(sys.argv[1]); assert 'hfq' not in sys.modules;"
        "print(m(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.isfinite().all().item())"
    )
    child = subprocess.run([stock_python(), "-c", code, tmp_path / "saved"], capture_output=True, text=True)
    assert (child.returncode, child.stdout.strip()) == (0, "True"), child.stderr


def test_test_loop_decides_where_it_is_asked_to() -> None:
    module, data, trainer = Classifier(), Examples(), Trainer(**QUIET)
    int8 = hfq.lightning.quantize(module, trainer, data, conf=CONF, stage="test")
    tested = trainer.test(module, data, verbose=False)[0]["accuracy"]
    assert int8.report().baseline.accuracy == pytest.approx(tested)


def test_module_with_its_own_data_and_a_loss_to_keep_low() -> None:
    criterion = AccuracyCriterion(higher_is_better=False, tolerable_loss=0.05)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion)
    int8 = hfq.lightning.quantize(Regression(), Trainer(**QUIET), metric="mse", conf=conf)
    report = int8.report()
    assert report.layers.static == ["net.0", "net.2"]
    assert report.quantized.accuracy <= 1.05 * report.baseline.accuracy


def test_same_seed_gives_the_same_model() -> None:
    first, second = (hfq.lightning.quantize(Classifier(), Trainer(**QUIET), Examples(), conf=CONF) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_whole_module_goes_through_fit() -> None:
    module, data, trainer = Classifier(), Examples(), Trainer(**QUIET)

    def evaluate(candidate: nn.Module) -> float:
        return trainer.validate(candidate, data, verbose=False)[0]["accuracy"]

    int8 = fit(module, CONF, data.val_dataloader(), eval_func=evaluate)
    assert isinstance(int8, Classifier)
    assert int8.trials[-1].accepted


def test_seed_page_puts_the_int8_model_into_the_module() -> None:
    module, data, trainer = Classifier(), Examples(), Trainer(**QUIET)

    def evaluate(model: nn.Module) -> float:
        module.model = model
        return trainer.validate(model=module, dataloaders=data.val_dataloader(), verbose=False)[0]["accuracy"]

    int8 = fit(model=module.model, conf=CONF, calib_dataloader=data.val_dataloader(), eval_func=evaluate)
    assert int8.config.num_labels == 2
    assert int8.trials[-1].accepted


def test_callback_exports_and_publishes_when_training_ends(tmp_path: Path, hub: LocalHub) -> None:
    callback = hfq.lightning.QuantizeOnFitEnd(tmp_path / "int8", conf=CONF, push_to="lightning-int8", token=hub.token)
    module, data = Classifier(), Examples()
    Trainer(max_epochs=1, limit_train_batches=2, callbacks=[callback], **QUIET).fit(module, data)
    assert module.training or next(module.parameters()).requires_grad  # what was trained stays what it was
    assert callback.quantized.trials[-1].accepted
    batch = {name: value for name, value in next(iter(data.val_dataloader())).items() if name != "labels"}
    with torch.inference_mode():
        expected = callback.quantized(**batch).logits
        assert_same(hfq.load(tmp_path / "int8")(**batch).logits, expected)
        published = hfq.load(f"{USER}/lightning-int8", token=hub.token)
        assert_same(published(**batch).logits, expected)


def test_callback_exports_nothing_when_the_goal_is_missed(tmp_path: Path) -> None:
    class Worse(Classifier):
        def on_validation_epoch_end(self) -> None:
            int8 = any(getattr(module, "activation", None) == "static" for module in self.modules())
            self.log("score", 0.0 if int8 else 1.0)

    callback = hfq.lightning.QuantizeOnFitEnd(tmp_path / "int8", metric="score")
    with pytest.raises(GoalNotMetError):
        Trainer(max_epochs=1, limit_train_batches=1, callbacks=[callback], **QUIET).fit(Worse(), Examples())
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"module": nn.Linear(2, 2)}, TypeError, "expected a LightningModule"),
        ({"trainer": None}, TypeError, "trainer is None"),
        ({"stage": "fit"}, ValueError, "stage is 'fit'"),
        ({"metric": "f1"}, ValueError, "'f1' is not among what the module logs: accuracy"),
        ({"datamodule": LightningDataModule()}, ValueError, "has no dataloader"),
    ],
)
def test_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"module": Classifier(), "trainer": Trainer(**QUIET), "datamodule": Examples(), "conf": CONF, **arguments}
    with pytest.raises(error) as found:
        hfq.lightning.quantize(**given)
    assert words in str(found.value)


class Wrapped(LightningModule):
    def __init__(self, model_name_or_path: str, **extra: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(model_name_or_path)
        self.right = torchmetrics.Accuracy(task="binary")


def checkpoint(path: Path, module: LightningModule) -> Path:
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def quantize_command(source: Path, output: Path) -> Done:
    data = write_slice(source.parent / "data", train=100, validation=100)
    return forkserver().hfq("quantize", source, "--dataset", data, "--output", output, cwd=source.parent)


def test_lightning_checkpoint_is_quantized(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "best.ckpt", Wrapped(str(CHECKPOINT)))
    done = quantize_command(source, tmp_path / "out")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "hfq.json").read_text())
    assert report["checkpoint"]["id"] == "best"
    assert report["baseline"]["accuracy"] > 0.95  # the weights are the trained ones
    assert report["met"]


def test_checkpoint_that_could_run_code_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "best.ckpt", Wrapped(str(CHECKPOINT), path=Path("x")))
    content = torch.load(source, weights_only=False)
    content["callbacks"] = {"mine": subprocess.Popen}
    torch.save(content, source)
    done = quantize_command(source, tmp_path / "out")
    assert done.code == 1
    assert "reading that could run code" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "best.ckpt"
    torch.save({"state_dict": {"model.weight": torch.ones(2, 2)}}, source)
    done = quantize_command(source, tmp_path / "out")
    assert done.code == 1
    assert "does not say which model it was made from" in done.err.splitlines()[-1]
