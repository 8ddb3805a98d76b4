"""Members of SpeechBrain 0.5's Brain, except its loops, which are in tests/parity."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from torch import nn

from brain_lightning import Brain, Checkpointer, patch_speechbrain, to_lightning
from tests.support.brains import (
    Regression,
    all_equal,
    loader,
    make,
    sgd,
    trainer_with,
    weights,
)

# SpeechBrain's own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


class TheirRegression(speechbrain.Brain):
    compute_forward = Regression.compute_forward
    compute_objectives = Regression.compute_objectives


@pytest.fixture(params=[Regression, TheirRegression])
def base(request: pytest.FixtureRequest) -> Iterator[Any]:
    with patch_speechbrain():
        yield request.param


# -------------------------------------------------------------------------- precision flags


def flags(brain: Any) -> tuple[bool, bool, bool]:
    return brain.auto_mix_prec, brain.bfloat16_mix_prec, brain.use_amp


FP32, BF16 = (False, False, False), (False, True, True)


def test_flags_show_the_precision_in_effect(base: Any) -> None:
    class Flags(base):
        def fit_batch(self, batch: Any) -> Any:
            self.found = flags(self)
            return super().fit_batch(batch)

    for options in ({"precision": "bf16"}, {"bfloat16_mix_prec": True}):
        brain = make(Flags, **options)
        assert (flags(brain), brain.precision) == (BF16, "bf16")
        brain.fit(range(1), loader())
        assert brain.found == BF16
    brain = make(Flags)
    brain.fit(range(1), loader())
    assert brain.found == flags(brain) == FP32
    # During its run, a Trainer's precision takes precedence.
    brain.fit(range(1), loader(), trainer={"precision": "bf16-mixed"})
    assert (brain.found, flags(brain)) == (BF16, FP32)
    trainer_with(precision="bf16-mixed", max_epochs=1).fit(to_lightning(brain), loader())
    assert (brain.found, flags(brain)) == (BF16, FP32)
    brain.auto_mix_prec = True
    assert flags(brain)[0]


def test_flags_exist_in_a_run_without_a_patch() -> None:
    class Flags(TheirRegression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            self.found = (*flags(self), self.progressbar, self.valid_step)

    brain = make(Flags)
    trainer_with(precision="bf16-mixed", max_epochs=1).fit(to_lightning(brain), loader())
    assert brain.found == (*BF16, False, 0)
    assert "_compile_jit" not in vars(speechbrain.Brain)


def test_progressbar_is_an_attribute(base: Any) -> None:
    assert make(base, noprogressbar=False).progressbar
    assert not make(base).progressbar


def test_a_check_gradients_that_is_never_called_logs_a_warning(
    base: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Checks(base):
        def check_gradients(self, loss: Any) -> Any:
            return super().check_gradients(loss)

    make(Checks).fit(range(1), loader())
    assert "Checks.check_gradients(loss) is never called" in caplog.text
    caplog.clear()

    class Calls(Checks):
        def fit_batch(self, batch: Any) -> Any:
            loss = self.compute_objectives(self.compute_forward(batch, None), batch, None)
            assert self.check_gradients(loss=loss)
            return loss.detach()

    make(Calls).fit(range(1), loader())
    assert "never called" not in caplog.text


# -------------------------------------------------------------------------------- valid_step


class Nan(nn.Module):
    """Has a NaN loss in its third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.batch = nn.Linear(4, 2), 0

    def forward(self, x: Any) -> Any:
        self.batch += self.training
        return self.line(x) * (torch.nan if self.batch == 3 else 1)


def test_valid_step_counts_finite_losses_of_an_epoch(base: Any) -> None:
    seen = []

    class Counting(base):
        def on_fit_batch_end(self, *_: Any) -> None:
            seen.append(self.valid_step)

    brain = make(Counting)
    brain.modules["model"] = Nan()
    brain.fit(range(2), loader(), loader())
    assert seen == [1, 2, 2, 3, 4, 1, 2, 3, 4, 5]
    assert brain.valid_step == 0


def test_a_recipes_own_valid_step_is_not_changed(base: Any) -> None:
    class Own(base):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.valid_step = 0

        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            self.valid_step += 1
            return super().evaluate_batch(batch, stage)

    brain = make(Own)
    brain.fit(range(2), loader(), loader(items=8))
    brain.fit(range(1), loader())
    assert brain.valid_step == 2


def test_windows_by_valid_step_are_resumed(tmp_path: Path) -> None:
    fitted = []

    class Window(Regression):
        stops = False

        def fit_batch(self, batch: Any) -> Any:
            fitted.append(self.step)
            loss = self.compute_objectives(self.compute_forward(batch, None), batch, None)
            self.valid_step += self.check_gradients(loss)
            (loss / 3).backward()
            if self.valid_step % 3 == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            return loss.detach()

        def _save_intra_epoch_ckpt(self) -> None:
            super()._save_intra_epoch_ckpt()
            if self.stops:
                raise KeyboardInterrupt

    def run(folder: str, stops: bool) -> Any:
        brain = make(Window, checkpointer=Checkpointer(tmp_path / folder),
                     ckpt_interval_steps=2)  # fmt: skip
        brain.checkpointer.add_recoverable("model", brain.modules.model)
        brain.stops = stops
        brain.fit(range(1), loader(items=36))
        return brain

    whole = run("whole", stops=False)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stops=True)
    assert all_equal(weights(whole), weights(run("stopped", stops=False)))
    assert not all_equal(weights(whole), weights(make()))
    assert fitted == [*range(1, 10), 1, 2, *range(3, 10)]


# --------------------------------------------------------- methods replaced on the base class


def one_step(brain: Any, batch: Any) -> Any:
    loss = brain.compute_objectives(brain.compute_forward(batch, None), batch, None)
    loss.backward()
    brain.optimizer.step()
    brain.optimizer.zero_grad()
    brain.optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("how", ["on the base class", "around", "on the object", "of a class"])
def test_a_replaced_fit_batch_is_called(
    base: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Brain if base is Regression else speechbrain.Brain
    expected = make(type("Own", (base,), {"fit_batch": one_step}))
    expected.fit(range(2), loader())
    brain = make(base)
    if how == "on the base class":
        monkeypatch.setattr(root, "fit_batch", one_step)
    elif how == "around":
        # A replacement that looks like the original.
        around = functools.wraps(root.fit_batch)(one_step)
        monkeypatch.setattr(root, "fit_batch", around)
    elif how == "on the object":
        brain.fit_batch = functools.partial(one_step, brain)
    else:
        monkeypatch.setattr(base, "fit_batch", one_step, raising=False)
    assert not to_lightning(brain).automatic_optimization
    brain.fit(range(2), loader())
    assert all_equal(weights(brain), weights(expected))
    assert not all_equal(weights(brain), weights(make(base)))


def test_a_replacement_of_any_hook_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Covers required hooks, and hooks that the loop calls only if they are overridden."""
    checked = []

    class Bare(Brain):
        pass

    monkeypatch.setattr(Brain, "compute_forward", Regression.compute_forward)
    monkeypatch.setattr(Brain, "compute_objectives", Regression.compute_objectives)
    monkeypatch.setattr(Brain, "check_loss_isfinite", lambda _, loss: checked.append(loss))
    brain = make(Bare)
    assert to_lightning(brain).automatic_optimization
    brain.fit(range(1), loader(), loader())
    assert len(checked) == brain.optimizer_step == 5


# ---------------------------------------------------------------------------------- modules


def test_modules_may_be_a_module_dict_and_hold_none(base: Any, tmp_path: Path) -> None:
    def run(modules: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        run_opts = {"device": "cpu", "noprogressbar": True, **options}
        brain = base(modules(nn.Linear(4, 2)), sgd, {}, run_opts)
        brain.fit(range(1, 3), loader(), loader())
        trainer = trainer_with(max_epochs=1, default_root_dir=tmp_path)
        trainer.fit(to_lightning(brain), loader(), loader())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        brain.evaluate(loader())
        return brain

    plain = run(lambda net: {"model": net})
    shared = run(lambda net: nn.ModuleDict({"model": net}))
    absent = run(lambda net: {"lm": None, "model": net}, remove_vector_weight_decay=True)
    nested = run(lambda net: nn.ModuleDict({"model": net, "lm": None}), profile_training=False)
    for brain in (shared, absent, nested):
        assert all_equal(weights(plain), weights(brain))
    assert absent.modules["lm"] is absent.modules.lm is None
    assert list(absent.modules) == ["lm", "model"]
