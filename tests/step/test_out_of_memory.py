"""Out-of-memory batches: they are described and skipped, or the run ends and resumes."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from speechbrain.dataio.batch import PaddedBatch
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import (
    Checkpointer,
    EpochCounter,
    RunOptionError,
    patch_speechbrain,
    to_lightning,
)
from brain_lightning.resume import before_batch
from brain_lightning.step import out_of_memory
from brain_lightning.step.out_of_memory import is_out_of_memory, notes
from brain_lightning.step.window import restart_window
from tests.support.brains import Regression, all_equal, loader, make, trainer_with, weights
from tests.support.resuming import BATCHES, Noise, seed
from tests.support.upstream import weights_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Full(nn.Module):
    """Runs out of memory in the forward or the backward pass if a flag is set."""

    forward_fails = backward_fails = False

    def forward(self, x: Any) -> Any:
        if self.forward_fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _Backward.apply(x, self)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, full: Full) -> Any:
        ctx.full = full
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if ctx.full.backward_fails:
            raise torch.OutOfMemoryError
        return gradient, None


class Stepping(torch.optim.Adam):
    """Fails in the middle of a step."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise MemoryError
        return super().step(closure)


WHERE = ("on_fit_batch_start", "forward", "backward", "step", "on_fit_batch_end")


class Greedy(Regression):
    """Random, with buffers. Fails once per element of ``failures``: (epoch, step, where)."""

    failures: tuple[tuple[int, int, str], ...] = ()

    def _fails(self, where: str) -> bool:
        now = (self.hparams.epoch_counter.current, self.step, where)
        return now in self.failures and self.modules.training

    def _fail(self, where: str) -> None:
        if self._fails(where):
            raise torch.OutOfMemoryError

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self._fail("on_fit_batch_start")
        if self.optimizer is not None:
            self.optimizer.fails = self._fails("step")

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        modules = self.modules
        modules.full.forward_fails = self._fails("forward")
        modules.full.backward_fails = self._fails("backward")
        # The last layer has gradients when the backward pass of the other layers fails.
        first = nn.functional.dropout(modules.norm(batch[0]), 0.3, self.modules.training)
        self.seen = getattr(self, "seen", 0) + 1
        return modules.model(modules.full(modules.first(first)))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.hparams.losses.append(self.step)
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, *_: Any) -> None:
        self.hparams.ended.append(self.step)
        self._fail("on_fit_batch_end")


class Losses(list):  # type: ignore[type-arg]
    """Statistics that a recipe collects in an epoch."""


class Around(Greedy):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class ByHand(Greedy):
    def fit_batch(self, batch: Any) -> Any:
        self.on_fit_batch_start(batch, True)
        stage = self._lightning.stage_type.TRAIN
        loss = self.compute_objectives(self.compute_forward(batch, stage), batch, stage)
        (loss / self.grad_accumulation_factor).backward()
        if self.step % self.grad_accumulation_factor == 0:
            self.optimizers_step()
        self.on_fit_batch_end(batch, None, loss, True)
        return loss.detach()


class Watching(Callback):
    """A callback that needs Lightning's own loop."""

    def on_before_backward(self, *args: Any) -> None:
        pass


def parts() -> dict[str, nn.Module]:
    return {"first": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "full": Full()}


def brain_of(cls: type[Greedy], folder: Path | None, *failures: Any, **options: Any) -> Any:
    counter = EpochCounter(2)
    hparams = {"epoch_counter": counter, "losses": Losses(), "ended": []}
    brain: Any = make(
        cls, lambda parameters: Stepping(parameters, 0.01), hparams=hparams, **options
    )
    for name, part in parts().items():
        brain.modules[name] = part
    if folder is not None:
        brain.checkpointer = Checkpointer(folder, {"counter": counter})
        brain.checkpointer.add_recoverables({"modules": brain.modules, "brain": brain})
    brain.failures = failures
    seed(999)
    return brain


def fit(brain: Any, data: Any = None, **arguments: Any) -> Any:
    data = DataLoader(Noise(), 4, shuffle=True) if data is None else data
    brain.fit(brain.hparams.epoch_counter, data, loader(), **arguments)
    return brain


def state(brain: Any) -> list[Any]:
    optimizer = brain.optimizer.state_dict()["state"]
    values = [value for each in optimizer.values() for value in each.values()]
    return [*brain.modules.state_dict().values(), *values, torch.get_rng_state()]


def assert_same(one: Any, other: Any) -> None:
    assert all_equal(state(one), state(other))
    assert one.optimizer_step == other.optimizer_step
    assert not all_equal(weights(one), weights(brain_of(Greedy, None)))


# ------------------------------------------------------------------------------- skipping

FAILURES = (
    (1, 2, "forward"), (1, 5, "backward"), (1, 6, "on_fit_batch_start"), (1, 8, "step"),
    (2, 1, "backward"), (2, 4, "on_fit_batch_end"), (2, 7, "forward"), (2, 12, "step"),
    # Neither this batch nor the step of its window has memory.
    (2, 10, "forward"), (2, 10, "step"),
)  # fmt: skip
# Batches that fail in or after their optimizer step.
UPDATES = {(1, 8), (2, 4), (2, 12)}
SKIPPED = {(epoch, step) for epoch, step, _ in FAILURES}


class Skips:
    """Skips the batches in which the other Brain runs out of memory."""

    def fit_batch(self: Any, batch: Any) -> Any:
        if (self.hparams.epoch_counter.current, self.step) not in SKIPPED:
            return super().fit_batch(batch)
        factor = self.grad_accumulation_factor
        updates = UPDATES if isinstance(self, ByHand) else {*UPDATES, (2, 10)}
        if (self.hparams.epoch_counter.current, self.step) in updates:
            self.zero_grad(set_to_none=True)
            restart_window(self)
        elif not isinstance(self, ByHand) and factor > 1 and self.step % factor == 0:
            has_gradients = any(p.grad is not None for p in self.modules.parameters())
            _ = has_gradients and self.optimizers_step()
        return torch.tensor(torch.nan)


class Scaled(Greedy):
    def on_fit_start(self) -> None:
        self.scaler = torch.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        super().on_fit_start()


class Weighed(Around):
    """Its batches have weights (``accumulate_by``)."""

    def loss_weight(self, batch: Any) -> float:
        return 1.0 + self.step % 3


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("cls", [Greedy, Watching, Around, ByHand, Scaled, Weighed])
def test_a_skipped_batch_leaves_nothing_but_its_number(
    cls: Any, factor: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"trainer": {"callbacks": [Watching()]}} if cls is Watching else {}
    cls = Greedy if cls is Watching else cls
    by_hand = type("ByHand", (Skips, cls), {})
    options = {
        "grad_accumulation_factor": factor,
        "accumulate_by": "tokens" if cls is Weighed else "batches",
    }
    expected = fit(brain_of(by_hand, None, **options))
    found = fit(brain_of(cls, None, *FAILURES, **options, oom_patience=5), **arguments)
    assert_same(expected, found)
    assert found.seen == expected.seen == 2 * BATCHES - len(SKIPPED) + 2 * 5
    assert found.scaler.state_dict() == expected.scaler.state_dict()
    assert 0 < found.optimizer_step <= (2 * BATCHES - len(SKIPPED))
    # Includes the batch that failed in this hook.
    assert len(found.hparams.ended) == 2 * BATCHES - len(SKIPPED) + 1
    told = [each for each in caplog.messages if "The batch is skipped" in each]
    numbers = [*(range(1, 5)), *range(1, 6)]
    for number, (epoch, step), each in zip(numbers, sorted(SKIPPED), told, strict=True):
        assert f"({number} of 5 that oom_patience allows in this epoch)" in each
        assert f"brain_lightning: in TRAIN, epoch {epoch}, step {step};" in each
    assert "Tried to allocate 2.00 GiB; brain_lightning: in TRAIN, epoch 1, step 2" in (
        caplog.text
    )


class Theirs(speechbrain.Brain):
    """The same with SpeechBrain's own Brain."""

    failures: tuple[tuple[int, int, str], ...] = ()
    _fails, _fail = Greedy._fails, Greedy._fail
    compute_forward = Greedy.compute_forward
    on_fit_batch_start, on_fit_batch_end = Greedy.on_fit_batch_start, Greedy.on_fit_batch_end

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.mse_loss(predictions, batch[1])


def test_speechbrains_own_brain_skips_too() -> None:
    ours = fit(brain_of(Greedy, None, *FAILURES, oom_patience=5))
    torch.manual_seed(0)
    hparams = {"epoch_counter": EpochCounter(2), "ended": [], "oom_patience": 5}
    theirs = Theirs(
        {"model": nn.Linear(4, 2), **parts()}, lambda parameters: Stepping(parameters, 0.01),
        hparams, {"device": "cpu", "noprogressbar": True},
    )  # fmt: skip
    theirs.failures = FAILURES
    seed(999)
    with patch_speechbrain():
        fit(theirs)
    assert_same(ours, theirs)


# -------------------------------------------------------------------- ending and resuming


def end(brain: Any, **arguments: Any) -> list[str]:
    """Returns the notes of the error that ends a run."""
    with pytest.raises((torch.OutOfMemoryError, MemoryError)) as caught:
        fit(brain, **arguments)
    return notes(caught.value)


@pytest.mark.parametrize(("where", "factor"), [*zip(WHERE, (1, 2, 2, 1, 2), strict=True)])
def test_a_run_that_skipped_and_ended_resumes_bit_for_bit(
    tmp_path: Path, where: str, factor: int
) -> None:
    options = {"grad_accumulation_factor": factor, "oom_patience": 1}
    first, second = (1, 2, "forward"), (2, 4, where)
    expected = fit(brain_of(Greedy, None, first, second, **options))
    # The count of skipped batches is saved, so a later failure of the epoch ends the run.
    for failures in [(first, (1, 8, where)), ((1, 10, where),), (second, (2, 8, where))]:
        found = end(brain_of(Greedy, tmp_path, *failures, **options))
        assert found[-1] == "brain_lightning: the run was saved, and resumes with this batch"
    resumed = fit(brain_of(Greedy, tmp_path, **options))
    assert_same(expected, resumed)
    assert resumed.seen == expected.seen


def test_without_patience_the_first_failure_ends_the_run(tmp_path: Path) -> None:
    clean = fit(brain_of(Greedy, None, oom_patience=0))
    assert_same(clean, fit(brain_of(Greedy, None)))
    found = end(brain_of(Greedy, tmp_path, (1, 3, "backward"), oom_patience=0))
    assert found == [
        "brain_lightning: in TRAIN, epoch 1, step 3",
        "brain_lightning: the batch has 0 (4, 4), 1 (4, 2)",
        "brain_lightning: the run was saved, and resumes with this batch",
    ]
    assert_same(clean, fit(brain_of(Greedy, tmp_path)))


class Plain(Greedy):
    """Has no random numbers and no buffers."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        self.modules.full.backward_fails = self._fails("backward")
        return self.modules.model(self.modules.full(self.modules.first(batch[0])))


def test_without_the_option_the_run_is_saved_too(tmp_path: Path) -> None:
    data = [*DataLoader(Noise(), 4)]

    def batches() -> Any:
        return DataLoader(data, batch_size=None)

    expected = fit(brain_of(Plain, None), batches())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(brain_of(Plain, tmp_path, (2, 5, "backward")), batches())
    assert "the run was saved, and resumes with this batch" in notes(caught.value)[-1]
    found = fit(brain_of(Plain, tmp_path), batches())
    assert all_equal(weights(expected), weights(found))
    assert found.optimizer_step == expected.optimizer_step
    # An optimizer step that has started cannot be undone.
    with pytest.raises(MemoryError) as caught:
        fit(brain_of(Plain, tmp_path / "step", (1, 5, "step")), batches())
    assert (
        "the run was not saved, because an optimizer had begun its step"
        in notes(caught.value)[-1]
    )
    assert not list((tmp_path / "step").glob("CKPT*"))


def test_a_trainer_of_the_user_saves_the_run(tmp_path: Path) -> None:
    def by_trainer(brain: Any, **arguments: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, save_last=True)
        trainer = trainer_with(saver, max_epochs=-1, enable_checkpointing=True)
        data = DataLoader(Noise(), 4, shuffle=True)
        trainer.fit(to_lightning(brain), data, loader(), **weights_only(True), **arguments)
        return brain

    options = {"oom_patience": 1}
    first = (1, 2, "forward")
    expected = fit(brain_of(Greedy, None, first, **options))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        by_trainer(brain_of(Greedy, None, first, (1, 7, "backward"), **options))
    assert "the run was saved" in notes(caught.value)[-1]
    resumed = by_trainer(brain_of(Greedy, None, **options), ckpt_path="last")
    assert_same(expected, resumed)


def test_a_run_that_is_not_saved_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    found = end(brain_of(Greedy, None, (1, 3, "forward")))
    assert found[-1] == "brain_lightning: the run was not saved"
    brain = brain_of(Greedy, tmp_path, (1, 3, "forward"))
    brain._save_intra_epoch_ckpt = lambda: tmp_path.joinpath("no", "such").touch()
    assert end(brain)[-1] == "brain_lightning: the run was not saved"
    assert "Could not save the run after the error that ends it" in caplog.text


def test_without_memory_for_copies_a_batch_is_still_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(before_batch, "gradients", fails)
    brain = brain_of(Greedy, None, *((1, step, "backward") for step in range(1, 13)))
    brain.oom_patience = 12
    fit(brain)
    assert brain.optimizer_step == BATCHES
    found = end(brain_of(Greedy, None, (1, 2, "step"), oom_patience=3))
    assert "an optimizer had begun its step" in found[-1]


# ----------------------------------------------------------------------- what is said of it


class Evaluating(Regression):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate")


PADDED = PaddedBatch(
    [{"id": f"utt{n}", "sig": torch.zeros(2 * n), "n": n, "words": ["a"]} for n in (1, 2)]
)


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (PADDED, "sig.data (2, 4), sig.lengths (2,) = [0.5, 1.0], n (2,)"),
        ({"id": ["a"], "wav": [torch.zeros(3, 1)], "wav_lens": torch.ones(1)},
         "wav.0 (3, 1), wav_lens (1,) = [1.0]"),
        (torch.zeros(2), "a tensor (2,)"),
        ([torch.zeros(1)] * 40, ", ".join(f"{n} (1,)" for n in range(16))),
    ],
)  # fmt: skip
def test_shapes_and_lengths_are_named_in_an_evaluation_too(batch: Any, shown: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        make(Evaluating).evaluate(DataLoader([batch], batch_size=None))
    ids = {"PaddedBatch": ", with batch.id ['utt1', 'utt2']", "dict": ", with batch.id ['a']"}
    assert notes(caught.value) == [
        f"brain_lightning: in TEST, step 1{ids.get(type(batch).__name__, '')}",
        f"brain_lightning: the batch has {shown}",
    ]


def test_which_errors_are_out_of_memory_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    meant = (
        "CUDA error: out of memory",
        "DefaultCPUAllocator: can't allocate memory: 9 bytes",
    )
    assert all(is_out_of_memory(RuntimeError(words)) for words in meant)
    others = [RuntimeError("out"), RuntimeError(3), RuntimeError(), ValueError(meant[0])]
    assert not any(map(is_out_of_memory, others))
    # The memory of a GPU is shown.
    gpu = SimpleNamespace(total_memory=4 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    error = torch.OutOfMemoryError()
    for _ in range(2):
        out_of_memory.note_memory(error, "cuda:0")
    assert notes(error) == [
        "brain_lightning: memory of cuda:0: 1.00 GiB allocated, 1.50 GiB reserved, of 4.00 GiB"
    ]


def test_what_a_failed_batch_holds_is_freed_before_the_save(tmp_path: Path) -> None:
    held: list[Any] = []

    class Holding(Greedy):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch, stage)
            if stage.name == "TRAIN" and not held:
                held.extend(map(weakref.ref, (predictions, loss)))
            return loss

    alive: list[Any] = []
    for arguments in ({}, {"trainer": {"callbacks": [Watching()]}}):
        held.clear()
        alive.clear()
        brain = brain_of(Holding, tmp_path, (1, 1, "backward"))
        brain._save_intra_epoch_ckpt = lambda: alive.extend(ref() for ref in held)
        end(brain, **arguments)
        assert alive == [None, None]


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_an_invalid_patience_raises_an_error(value: Any) -> None:
    with pytest.raises(RunOptionError, match=r"oom_patience=.* must be an integer, 0 or more"):
        make(oom_patience=value)
