"""SpeechBrain and brain_lightning read each other's counters, schedulers, statistics."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils import epoch_loop
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import nn

import brain_lightning
from brain_lightning import Checkpointer
from brain_lightning.checkpoints.hooks import (
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    register_checkpoint_hooks,
)

# If it is an attribute of speechbrain.nnet, it is imported on first use.
schedulers = importlib.import_module("speechbrain.nnet.schedulers")
CHECKPOINTERS = {"ours": Checkpointer, "speechbrain": SpeechBrainCheckpointer}
WAYS = list(itertools.product(CHECKPOINTERS, CHECKPOINTERS))
both_ways = pytest.mark.parametrize(("writer", "reader"), WAYS)
SIDES = {"ours": brain_lightning, "speechbrain": epoch_loop}
COUNTERS = list(itertools.product(SIDES, ["EpochCounter", "EpochCounterWithStopper"]))


def save(writer: str, folder: Path, obj: Any) -> None:
    CHECKPOINTERS[writer](folder, {"object": obj}).save_checkpoint()


def load(reader: str, folder: Path, obj: Any) -> Any:
    assert CHECKPOINTERS[reader](folder, {"object": obj}).recover_if_possible() is not None
    return obj


# ------------------------------------------------------------------------------ counters


def counter_of(kind: tuple[str, str], epochs: int = 0, metric: Any = 0.5) -> Any:
    side, name = kind
    stops = name == "EpochCounterWithStopper"
    counter = getattr(SIDES[side], name)(9, *([4, 0, "min"] if stops else []))
    for _ in range(epochs):
        next(counter)
        if stops:
            counter.update_metric(metric)
    return counter


def patience_of(counter: Any) -> tuple[Any, ...]:
    return counter.best_limit, counter.best_score, counter.should_stop


@both_ways
@pytest.mark.parametrize("written", COUNTERS, ids=" ".join)
@pytest.mark.parametrize("read", COUNTERS, ids=" ".join)
def test_every_counter_reads_the_file_of_every_other(
    tmp_path: Path, written: Any, read: Any, writer: str, reader: str
) -> None:
    save(writer, tmp_path, counter_of(written, epochs=3))
    counter = load(reader, tmp_path, counter_of(read))
    assert counter.current == 3
    assert list(counter) == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "metric",
    [0.5, torch.tensor(0.5), torch.tensor(0.5).numpy()],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("written", ["ours", "speechbrain"])
@pytest.mark.parametrize("read", ["ours", "speechbrain"])
def test_patience_goes_on_with_our_checkpointer(
    tmp_path: Path, written: str, read: str, metric: Any
) -> None:
    """SpeechBrain's Checkpointer does not save the best epoch of its own stopper."""
    first = counter_of((written, "EpochCounterWithStopper"), 3, metric)
    save("ours", tmp_path, first)
    second = load("ours", tmp_path, counter_of((read, "EpochCounterWithStopper")))
    assert patience_of(second) == (1, 0.5, False)
    assert [second.update_metric(0.6) for _ in second] == [None, None]
    assert second.current == 5


@pytest.mark.parametrize("read", ["ours", "speechbrain"])
@pytest.mark.parametrize("direction", ["min", "max"])
def test_patience_begins_anew_from_a_bare_number_and_that_is_told(
    tmp_path: Path, read: str, direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    save("speechbrain", tmp_path, counter_of(("speechbrain", "EpochCounter"), 3))
    counter = SIDES[read].EpochCounterWithStopper(9, 4, 0, direction)
    # Its state is from another run.
    next(counter)
    counter.update_metric(7.0)
    counter.should_stop = True
    load("ours", tmp_path, counter)
    assert patience_of(counter) == (3, counter.sign * torch.inf, False)
    (told,) = [record.message for record in caplog.records if "The patience" in record.message]
    assert "The patience of EpochCounterWithStopper restarts after epoch 3" in told


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["EpochCounter", "EpochCounterWithStopper"])
def test_the_yaml_of_a_stopper_is_read(tmp_path: Path, side: str, name: str) -> None:
    """SpeechBrain's stopper writes this YAML in ``_save``. So did brain_lightning 0.1.0."""
    path = tmp_path / "counter.ckpt"
    theirs = counter_of(("speechbrain", "EpochCounterWithStopper"), 3)
    hooks = {"object": lambda obj, path: theirs._save(path)}
    Checkpointer(tmp_path, {"object": theirs}, custom_save_hooks=hooks).save_checkpoint()
    counter = load("ours", tmp_path, counter_of((side, name)))
    assert counter.current == 3
    if name == "EpochCounterWithStopper":
        assert patience_of(counter) == patience_of(theirs)
    theirs._save(path)
    ours = counter_of(("ours", name))
    ours._recover(path, end_of_epoch=False)
    assert ours.current == 2


@pytest.mark.parametrize("name", ["EpochCounter", "EpochCounterWithStopper"])
def test_the_best_epoch_of_another_number_is_not_taken(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "counter.ckpt"
    counter_of(("ours", "EpochCounterWithStopper"), 3)._save(path)
    path.write_text("7")
    counter = counter_of(("ours", name))
    counter._recover(path)
    assert counter.current == 7
    assert ("The patience of" in caplog.text) is (name == "EpochCounterWithStopper")


def test_what_is_no_counters_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "counter.ckpt"
    path.write_text("epoch seven")
    counter = counter_of(("ours", "EpochCounterWithStopper"), 3)
    with pytest.raises(
        ValueError, match=r"is not the file of an epoch counter: it contains 'epoch seven'"
    ):
        counter._recover(path)
    assert counter.current == 3


# ---------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, tuple[Any, ...]] = {
    "WarmAndExpDecayLRSchedule": (0.5, 3, 10),
    "NewBobScheduler": (1.0,),
    "LinearWarmupScheduler": (1.0, 2, 9),
    "NoamScheduler": (1.0, 3),
    "NoamIntervalScheduler": (1.0, 3, [2], [5]),
    "LinearNoamScheduler": (1.0, 3, 4),
    "CyclicCosineScheduler": (3, 1.0, 9),
    "ReduceLROnPlateau": (1e-8, 0.5, 0),
    "CyclicLRScheduler": (0.1, 0.3, 3),
    "IntervalScheduler": ([{"steps": 2, "lr": 0.3}, {"steps": 4, "lr": 0.2}],),
    "InverseSquareRootScheduler": (2,),
    "WarmCoolDecayLRSchedule": (0.5, 2, 3, 10),
    "TriStageLRSchedule": (0.5, 2, 2, 4, 8),
}


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def call(scheduler: Any, sgd: torch.optim.Optimizer, step: int) -> Any:
    """Calls a scheduler, whose argument names vary."""
    if hasattr(scheduler, "on_batch_end"):
        # __call__ of this scheduler changes nothing.
        return scheduler.on_batch_end(sgd)
    values = {
        "optim": sgd, "opt": sgd, "optimizer": sgd, "num_updates": step, "n_steps": step,
        "current_epoch": step, "metric_value": 1.0, "current_loss": 1.0,
        "optim_list": [sgd],
    }  # fmt: skip
    taken = inspect.signature(scheduler.__call__).parameters
    return scheduler(**{name: values[name] for name in taken if name in values})


def made(name: str) -> Any:
    return getattr(schedulers, name)(*SCHEDULERS[name])


def test_every_scheduler_of_speechbrains_that_is_saved_is_among_them() -> None:
    found = {
        name
        for name, cls in vars(schedulers).items()
        if inspect.isclass(cls)
        and any(hasattr(method, "_speechbrain_saver") for method in vars(cls).values())
    }
    # It is not registered, so both sides save it like any module.
    assert found - {"ScheduledLoss"} == set(SCHEDULERS)


@both_ways
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(
    tmp_path: Path, name: str, writer: str, reader: str
) -> None:
    if not callable(made(name)):
        pytest.skip(f"{name} cannot be called before SpeechBrain 1.1")
    first, second, sgd = made(name), made(name), optimizer()
    for step in range(1, 4):
        call(first, sgd, step)
    save(writer, tmp_path, first)
    if name == "InverseSquareRootScheduler" and reader == "speechbrain":
        # It registers a save hook and no load hook.
        with pytest.raises(RuntimeError, match="Don't know how to load"):
            load(reader, tmp_path, second)
        return
    load(reader, tmp_path, second)
    other = optimizer()
    other.load_state_dict(sgd.state_dict())
    assert [call(first, sgd, step) for step in (4, 5)] == [
        call(second, other, step) for step in (4, 5)
    ]
    assert sgd.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@both_ways
@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: torch.optim.lr_scheduler.CyclicLR(sgd, 0.1, 1.0, cycle_momentum=False),
        lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 2),
        lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (1 + step)),
    ],
    ids=["CyclicLR", "StepLR", "LambdaLR"],
)
def test_a_scheduler_of_torchs_goes_on_where_it_was(
    tmp_path: Path, make: Callable[[Any], Any], writer: str, reader: str
) -> None:
    first, second = make(optimizer()), make(optimizer())
    for _ in range(3):
        first.optimizer.step()
        first.step()
    save(writer, tmp_path, first)
    load(reader, tmp_path, second)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for each in (first, second):
        each.optimizer.step()
        each.step()
    assert (first.last_epoch, first.get_last_lr()) == (second.last_epoch, second.get_last_lr())


# ------------------------------------------------------------------------- normalization


@both_ways
@pytest.mark.parametrize("norm_type", ["sentence", "batch", "global"])
def test_input_normalization_goes_on_where_it_was(
    tmp_path: Path, norm_type: str, writer: str, reader: str
) -> None:
    first, second = InputNormalization(norm_type), InputNormalization(norm_type)
    lengths = torch.tensor([1.0, 0.5])
    for scale in (1, 3):
        first(torch.rand(2, 8, 5) * scale, lengths, epoch=0)
    save(writer, tmp_path, first)
    load(reader, tmp_path, second)
    x = torch.rand(2, 8, 5)
    # Once with the current statistics, and once after they have changed.
    for epoch in (9, 0):
        assert torch.equal(first(x, lengths, epoch=epoch), second(x, lengths, epoch=epoch))
    assert first.count == second.count


@both_ways
def test_input_normalization_within_a_module(tmp_path: Path, writer: str, reader: str) -> None:
    """Normalization as in SpeechBrain's ``Pretrained`` classes and in many recipes."""
    first, second = (nn.ModuleDict({"norm": InputNormalization()}) for _ in range(2))
    first["norm"](torch.rand(2, 8, 5), torch.ones(2), epoch=0)
    save(writer, tmp_path, first)
    load(reader, tmp_path, second)
    # Its statistics are not buffers. Only its own hooks save them, not the module around it.
    assert second["norm"].count == 0


# ------------------------------------------------- classes that are registered with us alone


@register_checkpoint_hooks
class Marked:
    """Records which of its methods has set its number."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.by = number, ""

    @mark_as_saver
    def save(self, path: str) -> None:
        Path(path).write_text(str(self.number), encoding="utf-8")

    @mark_as_loader
    def load(self, path: str, end_of_epoch: bool) -> None:
        self.number, self.by = int(Path(path).read_text(encoding="utf-8")), "load"

    @mark_as_transfer
    def transfer(self, path: str) -> None:
        self.number, self.by = int(Path(path).read_text(encoding="utf-8")), "transfer"


@register_checkpoint_hooks
class MarkedAgain(Marked):
    @mark_as_transfer
    @mark_as_loader
    def load(self, path: str, end_of_epoch: bool = True) -> None:
        super().load(path, end_of_epoch)


@register_checkpoint_hooks
class MarkedModule(nn.Linear):
    by = ""

    def __init__(self) -> None:
        super().__init__(2, 1)

    @mark_as_transfer
    def transfer(self, path: str, device: Any = None) -> None:
        self.load_state_dict(torch.load(path))
        self.by = "transfer"


@both_ways
def test_a_class_that_is_registered_with_us_is_known_to_both(
    tmp_path: Path, writer: str, reader: str
) -> None:
    save(writer, tmp_path, Marked(7))
    found = load(reader, tmp_path, Marked())
    assert (found.number, found.by) == (7, "load")


@pytest.mark.parametrize("writer", CHECKPOINTERS)
def test_transfer_hooks_are_called_by_a_pretrainer(tmp_path: Path, writer: str) -> None:
    module = MarkedModule()
    each: dict[Any, tuple[Any, str]] = {
        "marked": (Marked(7), "transfer"),
        "again": (MarkedAgain(7), "load"),
        "sub": (type("Sub", (Marked,), {})(7), "transfer"),
        "module": (module, "transfer"),
    }
    for name, (saved, by) in each.items():
        folder = tmp_path / name
        save(writer, folder, saved)
        loaded = type(saved)()
        (directory,) = folder.glob("CKPT*")
        transfer = Pretrainer(folder / "transfer", loadables={"object": loaded})
        transfer.collect_files(str(directory))
        transfer.load_collected()
        assert loaded.by == by
        assert getattr(loaded, "number", 7) == 7
        assert torch.equal(getattr(loaded, "weight", module.weight), module.weight)
