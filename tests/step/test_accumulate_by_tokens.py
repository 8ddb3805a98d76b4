"""A window of unequal batches gives the gradient of one batch with all of their items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from speechbrain import Brain as SpeechBrains
from torch import Tensor
from torch.utils.data import DataLoader

from brain_lightning import patch_speechbrain, to_lightning
from brain_lightning.errors import BrainTypeError, RunOptionError, UnsupportedError
from brain_lightning.resume import before_batch
from brain_lightning.step.window import Window, window_of
from brain_lightning.trials.trial import Trial
from tests.support.brains import (
    Manual,
    Regression,
    all_equal,
    dataset,
    loader,
    make,
    trainer_with,
    weights,
)
from tests.support.resuming import Cut, Noise, Noisy, assert_same, at, brain_in, seed
from tests.support.upstream import weights_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

SIZES = (5, 1, 3, 7, 2, 9, 4, 1)
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
TOKENS = {"accumulate_by": "tokens"}
WINDOWS = {"grad_accumulation_factor": 4, **TOKENS}

# Indices of the batches in SIZES that are merged into one batch.
Groups = Sequence[Sequence[int]]
ONE_BY_ONE = [[number] for number in range(8)]
LARGE = [range(4), range(4, 8)]


class Weighed(Regression):
    """Its loss is the mean over the items of a batch."""

    def loss_weight(self, batch: Any) -> Any:
        return len(batch[1])

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.losses = [*getattr(self, "losses", []), stage_loss]


class Around(Weighed):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)

    def optimizers_step(self) -> None:
        super().optimizers_step()


class Scaled(Weighed):
    """Uses the gradient scaler of fp16."""

    def on_fit_start(self) -> None:
        self.scaler = torch.GradScaler("cpu", init_scale=2.0**16)
        super().on_fit_start()


class Counts(Weighed):
    """Counts targets while it computes the loss, as a recipe that augments batches does."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.targets = torch.tensor([predictions.numel()], dtype=torch.half)
        return super().compute_objectives(predictions, batch, stage)

    def loss_weight(self, batch: Any) -> Tensor:
        return self.targets


class Theirs(SpeechBrains):
    compute_forward = Regression.compute_forward
    compute_objectives = Regression.compute_objectives
    loss_weight = Weighed.loss_weight


class Listens(Callback):
    """A callback that needs Lightning's own loop."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """A hook that the lean loops do not call."""


def fitted(
    cls: Any = Weighed,
    groups: Groups = LARGE,
    dtype: torch.dtype = torch.float32,
    trainer: Any = None,
    epochs: int = 2,
    **options: Any,
) -> Any:
    # Clipping would hide the size of the gradients.
    brain = make(cls, **{"max_grad_norm": 0, **options})
    brain.modules.to(dtype)
    parts = [each.to(dtype).split(SIZES) for each in dataset(sum(SIZES)).tensors]
    batches = [
        tuple(torch.cat([each[i] for i in group]) for each in parts) for group in groups
    ]
    brain.fit(range(epochs), DataLoader(batches, batch_size=None), trainer=trainer or {})
    return brain


def difference(brain: Any, other: Any) -> float:
    pairs = zip(weights(brain), weights(other), strict=True)
    return max(float((one - two).abs().max()) for one, two in pairs)


class Half(Scaled):
    """The product of its loss and its weight overflows in fp16."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return super().compute_objectives(predictions, batch, stage).half()

    def loss_weight(self, batch: Any) -> Any:
        return 1e5 * len(batch[1])


@pytest.mark.parametrize("norm", [0, 0.5])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("cls", "trainer", "options"),
    [
        (Weighed, {}, WINDOWS),
        (Weighed, {"callbacks": [Listens()]}, WINDOWS),
        (Weighed, {"accumulate_grad_batches": 4}, TOKENS),
        (Around, {}, WINDOWS),
        (Scaled, {}, WINDOWS),
        (Counts, {}, WINDOWS),
        (Theirs, {}, {"grad_accumulation_factor": 4, "hparams": TOKENS}),
    ],
)
def test_a_window_is_one_large_batch(
    cls: Any, trainer: Any, options: Any, dtype: torch.dtype, norm: float
) -> None:
    large = fitted(dtype=dtype, max_grad_norm=norm)
    with patch_speechbrain():
        brain = fitted(cls, ONE_BY_ONE, dtype, trainer, max_grad_norm=norm, **options)
    assert brain.optimizer_step == large.optimizer_step == 4
    assert difference(brain, large) <= BOUNDS[dtype]
    assert difference(brain, make()) > 0.05


def test_a_loss_in_fp16_is_weighed_in_full_precision() -> None:
    brain = fitted(Half, ONE_BY_ONE, epochs=20, **WINDOWS)
    assert brain.nonfinite_count == 0
    # The scaler skips the first steps, until it has found its scale.
    assert 0.05 < difference(brain, make()) < 2


def test_by_default_batches_weigh_the_same_and_numbers_are_means_over_batches() -> None:
    tokens = fitted(groups=ONE_BY_ONE, epochs=1, **WINDOWS)
    batches = fitted(groups=ONE_BY_ONE, epochs=1, **WINDOWS | {"accumulate_by": "batches"})
    default = fitted(Regression, ONE_BY_ONE, epochs=1, grad_accumulation_factor=4)
    assert all_equal(weights(batches), weights(default))
    assert difference(batches, tokens) > 1e-3
    first = [
        fitted(groups=ONE_BY_ONE[:4], epochs=1, **WINDOWS | {"accumulate_by": way}).losses
        for way in ("batches", "tokens")
    ]
    assert first[0] == first[1]


class OwnLoop(Weighed):
    """A short version of SpeechBrain's loop."""

    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        self.modules.train()
        self.zero_grad()
        for self.step, batch in enumerate(train_set, 1):
            self.fit_batch(batch)
        self.zero_grad(set_to_none=True)


def test_an_incomplete_window_is_dropped_or_has_its_own_mean() -> None:
    one = fitted(groups=LARGE[:1])
    assert difference(fitted(OwnLoop, ONE_BY_ONE[:7], **WINDOWS), one) <= 1e-6
    dropped = fitted(groups=ONE_BY_ONE[:7], **WINDOWS)
    assert difference(dropped, one) <= 1e-6
    used = fitted(groups=ONE_BY_ONE[:7], trainer={"accumulate_grad_batches": 4}, **TOKENS)
    assert difference(used, fitted(groups=[range(4), range(4, 7)])) <= 1e-6
    assert (window_of(used), window_of(dropped)) == (Window(None, 16), Window(None, 32))


class LeavesOut(Weighed):
    """The loss of two batches is not finite."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * torch.nan if len(batch[1]) in (3, 9) else loss


class Weightless(Weighed):
    """Two batches have no targets."""

    def loss_weight(self, batch: Any) -> float:
        return 0.0 if len(batch[1]) in (3, 9) else len(batch[1])


@pytest.mark.parametrize("cls", [LeavesOut, Weightless])
def test_a_batch_without_a_loss_or_a_target_has_no_weight(cls: Any) -> None:
    options = {**WINDOWS, "nonfinite_patience": 4}
    brain = fitted(cls, ONE_BY_ONE, **options)
    assert difference(brain, fitted(groups=[[0, 1, 3], [4, 6, 7]])) <= 1e-6
    nothing = [[2], [5], [2], [5], [0], [1], [3], [4]]
    assert difference(fitted(cls, nothing, **options), fitted(groups=[[0, 1, 3, 4]])) <= 1e-6


def test_an_optimizer_that_is_frozen_keeps_its_gradients_until_it_steps() -> None:
    class Two(Weighed):
        def init_optimizers(self) -> None:
            model = self.modules.model
            self.optimizers_dict = {
                name: torch.optim.SGD([getattr(model, name)], 0.1)
                for name in ("weight", "bias")
            }

        def freeze_optimizers(self, optimizers: Any) -> Any:
            return optimizers if self.optimizer_step else {"weight": optimizers["weight"]}

    brain, large = fitted(Two, ONE_BY_ONE, epochs=1, **WINDOWS), fitted(Two, epochs=1)
    # Both windows have the same number of items.
    assert difference(brain, large) <= 1e-6
    assert difference(brain, fitted(epochs=1)) > 1e-3


class Greedy(Weighed):
    """Runs out of memory once."""

    fails_at = (0, "")

    def fails(self, where: str) -> None:
        if self.fails_at == (self.step, where):
            self.fails_at = (0, "")
            raise torch.OutOfMemoryError

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.optimizer.register_step_pre_hook(lambda *_: self.fails("step"))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.fails("forward")
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.fails("end")


def full(_: Any) -> Any:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("fails_at", "copies", "groups"),
    [
        ((4, "forward"), True, [range(3), range(4, 8)]),
        ((2, "end"), True, [(0, 2, 3), range(4, 8)]),
        # Without a copy, the accumulated gradients are dropped, too.
        ((2, "end"), False, [(2, 3), range(4, 8)]),
        ((1, "end"), False, [range(1, 4), range(4, 8)]),
        ((8, "step"), True, LARGE[:1]),
    ],
)
def test_a_batch_without_memory_has_no_weight(
    monkeypatch: pytest.MonkeyPatch, fails_at: Any, copies: bool, groups: Groups
) -> None:
    if not copies:
        monkeypatch.setattr(before_batch, "gradients", full)
    cls = type("FailsAt", (Greedy,), {"fails_at": fails_at})
    brain = fitted(cls, ONE_BY_ONE, oom_patience=1, **WINDOWS)
    assert difference(brain, fitted(groups=[*groups, *LARGE], epochs=1)) <= 1e-6
    assert brain.fails_at == (0, "")


class Tries(Callback):
    """Runs a trial in the middle of a window."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        brain, before = module.brain, window_of(module.brain)
        steps = brain.optimizer_step
        with Trial(module.run, trainer) as trial:
            trial.start()
            assert window_of(brain).weight is None
            for _ in range(4):
                trial.fit(batch)
            assert brain.optimizer_step == steps + 1
        assert window_of(brain) is before


def test_a_trial_has_its_own_windows() -> None:
    brain = fitted(groups=ONE_BY_ONE, trainer={"callbacks": [Tries()]}, **WINDOWS)
    assert all_equal(weights(brain), weights(fitted(groups=ONE_BY_ONE, **WINDOWS)))


# ----------------------------------------------------------------------- resuming


class Cuttable(Noisy):
    """Batches have random weights. A run is cut within a batch or after a step."""

    cut_in = ""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.optimizer.register_step_post_hook(lambda *_: self.cut_when("step"))

    def loss_weight(self, batch: Any) -> Tensor:
        self.cut_when("forward")
        return batch[0].abs().sum() + torch.rand(1)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.cut_when("end")

    def cut_when(self, moment: str) -> None:
        if moment == self.cut_in and self.cut is not None and self.cut(self):
            raise Cut


def run(folder: Path, epoch: int = 0, step: int = 0, cut_in: str = "") -> Any:
    """Resumes from the file that an error leaves, or from a directory per batch."""
    is_trainers = cut_in != "end"
    options = {
        **TOKENS,
        "grad_accumulation_factor": 3,
        "ckpt_interval_steps": 0 if is_trainers else 2,
    }
    brain: Any = brain_in(None if is_trainers else folder, **options)
    brain.__class__ = Cuttable
    brain.cut, brain.cut_in = at(epoch, step), cut_in
    data = DataLoader(Noise(), 4, shuffle=True)
    if not is_trainers:
        brain.fit(brain.hparams.epoch_counter, data, loader())
        return brain
    trainer = trainer_with(
        OnExceptionCheckpoint(folder), max_epochs=-1, enable_checkpointing=True
    )
    trainer.fit(to_lightning(brain), data, loader(), ckpt_path="last", **weights_only(True))
    return brain


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("epoch", "step", "cut_in"),
    [(1, 3, "end"), (2, 6, "end"), (1, 2, "forward"), (2, 6, "step")],
)
def test_a_window_is_resumed(
    tmp_path: Path, whole: Any, epoch: int, step: int, cut_in: str
) -> None:
    with pytest.raises(Cut):
        run(tmp_path, epoch, step, cut_in)
    seed(77)
    resumed = run(tmp_path, cut_in="end" if cut_in == "end" else "")
    assert_same(whole, resumed)
    assert window_of(whole).state() == window_of(resumed).state()
    assert window_of(whole).reference != 1


# ----------------------------------------------------------------------- errors


class OwnStep(Weighed):
    def optimizers_step(self) -> None:
        self.optimizer.step()


class ManualWeighed(Manual):
    loss_weight = Weighed.loss_weight


class TheirsAround(Theirs):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Regression, r"needs a method loss_weight\(self, batch\) of Regression"),
        (type("Number", (Regression,), {"loss_weight": 0.3}), "needs a method loss_weight"),
        (ManualWeighed, r"has no effect in ManualWeighed\.fit_batch\. Derive"),
        (OwnStep, r"has no effect in OwnStep\.optimizers_step\. Derive"),
        (TheirsAround, "Derive TheirsAround from brain_lightning.Brain and call super"),
    ],
)
def test_missing_weights_raise_an_error_before_training(cls: Any, words: str) -> None:
    with patch_speechbrain():
        brain = make(cls, hparams=TOKENS, grad_accumulation_factor=4)
        with pytest.raises(UnsupportedError, match=words):
            brain.fit(range(1), loader())
        assert all_equal(weights(brain), weights(make()))
        make(cls).fit(range(1), loader())


@pytest.mark.parametrize("weight", [
    None, "many", -1, float("nan"), torch.ones(2), True + 0j, torch.tensor(1j), 1e300, 10**400,
])  # fmt: skip
def test_a_weight_is_a_number_of_targets(weight: Any) -> None:
    cls = type("Wrong", (Regression,), {"loss_weight": lambda self, batch: weight})
    with pytest.raises(BrainTypeError, match=r"Wrong\.loss_weight must return the number of"):
        make(cls, **TOKENS).fit(range(1), loader())


def test_other_values_raise_an_error_or_belong_to_the_recipe() -> None:
    words = "accumulate_by='frames' is not supported. Use one of batches, to"
    with pytest.raises(RunOptionError, match=words):
        make(accumulate_by="frames")
    assert make(hparams={"accumulate_by": 3})._lightning.accumulate_by == "batches"
