"""Looks up names that callbacks monitor in the code of a recipe."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from brain_lightning import to_lightning
from brain_lightning.callback.monitored import warn_of_unknown_names
from tests.support.brains import Regression, loader, make, trainer_with

NAMES = ("PER", "chrf")


def of_a_module() -> dict[str, float]:
    return {"mAP": 0.0}


class Reporting(Regression):
    kinds = ("BLEU", "TER")

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        stats = dict(loss=stage_loss, WER=1.0, asr={"CER": 2.0})  # noqa: C408
        stats |= dict.fromkeys(self.kinds, 0.0)
        stats |= {f"dev_{kind}": 0.0 for kind in NAMES}
        self.report(stats, stage)

    def report(self, stats: Any, stage: Any) -> None:
        """Reports the cosine over all batches."""
        self.hparams.train_logger.log_stats({"epoch": 1}, valid_stats=stats | of_a_module())


class Logging(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.log("norm", 2.0)


def told_of(
    name: str,
    cls: type[Regression] = Reporting,
    validates: bool = True,
    kind: Any = EarlyStopping,
) -> str:
    """Returns the warning, or an empty string."""
    brain = make(cls, hparams={"error_name": "STOI", "criteria": ["SDR"]})
    callbacks = Logging(), LearningRateMonitor(), kind(monitor=name)
    trainer = trainer_with(*callbacks, enable_checkpointing=kind is ModelCheckpoint)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_unknown_names(trainer, brain, validates)
    return "".join(str(each.message) for each in found)


@pytest.mark.parametrize(
    "name",
    [
        "train_loss", "train_loss_step", "valid_loss", "loss", "WER", "valid_WER", "train_WER",
        "asr_CER", "valid_asr_CER", "BLEU", "valid_TER", "dev_PER", "valid_dev_chrf", "mAP",
        "valid_mAP", "STOI", "valid_SDR", "norm", "lr-SGD/pg1", "valid_loss_1",
        "valid_loss_clean", "valid_WER_0",
    ],
)  # fmt: skip
def test_what_may_be_reported_is_no_mistake(name: str) -> None:
    assert told_of(name) == ""


@pytest.mark.parametrize(
    "name",
    [
        "val_loss", "validation/loss", "train_loss_epoch", "test_loss", "avg_val_loss", "WRE",
        "valid_WRE", "cosine", "step",
    ],
)  # fmt: skip
def test_what_nothing_reports_is_told_of(name: str) -> None:
    found = told_of(name)
    assert found.startswith(
        f"EarlyStopping(monitor={name!r}): the code of Reporting does not seem"
    )
    assert "train_loss, train_loss_step, valid_loss, loss" in found


def test_a_close_name_is_suggested() -> None:
    assert told_of("val_loss").endswith("Did you mean 'valid_loss'?")


def test_the_loss_of_a_validation_needs_one() -> None:
    class Validating(Regression):
        def on_fit_batch_end(self, *_: Any) -> None:
            self._fit_valid(None, 1, False)

    assert "'valid_loss'" in told_of("valid_loss", validates=False)
    assert "'valid_loss_0'" in told_of("valid_loss_0", validates=False)
    assert told_of("valid_loss", Validating, validates=False) == ""


def test_model_checkpoint_knows_the_step() -> None:
    assert told_of("step", kind=ModelCheckpoint) == ""


def test_summaries_of_speechbrain_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("speechbrain.utils.edit_distance")

    def wer_summary() -> dict[str, int]:
        return {"stutters": 1}

    wer_summary.__module__ = module.__name__
    module.wer_summary = wer_summary  # type: ignore[attr-defined]
    # SpeechBrain, which another test may have imported, has no such name.
    assert told_of("valid_stutters")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert told_of("valid_stutters") == ""


def test_it_is_told_of_before_anything_is_trained() -> None:
    class Never(Regression):
        def on_fit_start(self) -> None:
            raise AssertionError

    stopping = EarlyStopping("val_loss")
    with pytest.warns(UserWarning, match="monitor='val_loss'"), pytest.raises(AssertionError):
        trainer_with(stopping).fit(to_lightning(make(Never)), loader(), loader())
