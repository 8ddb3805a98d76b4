"""A resumed run calls each callback hook once that the interrupted run called or missed."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from brain_lightning import to_lightning
from brain_lightning.callback.called_hooks import BATCH_HOOKS, EPOCH_HOOKS
from tests.support.brains import loader, make, trainer_with
from tests.support.resuming import (
    BATCHES,
    Cut,
    Noise,
    Noisy,
    assert_same,
    at,
    brain_in,
    fit_with_trainer,
)
from tests.support.upstream import needs_lightning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches != 1"),
]

PLAN = [0.5, 0.4, 0.45, 0.46, 0.47, 0.48, 0.49]


class Planned(Noisy):
    """Saves at the end of each validation, and has predefined validation losses."""

    def evaluate_batch(self, batch: Any, stage: Any) -> torch.Tensor:
        return torch.tensor(PLAN[self.hparams.epoch_counter.current - 1])

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.checkpointer.save_and_keep_only(meta={"error": stage_loss})


def train_set() -> DataLoader[Any]:
    return DataLoader(Noise(), 4, shuffle=True)


def run(
    folder: Path,
    *callbacks: Callback,
    cut: Any = None,
    cls: type[Noisy] = Planned,
    epochs: int = 7,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Noisy:
    """Runs ``brain.fit``, resuming from the checkpoints in the folder."""
    brain = brain_in(folder, **{"ckpt_interval_minutes": 0, **options})
    brain.__class__, brain.cut = cls, cut
    counter = brain.hparams.epoch_counter
    counter.limit = epochs
    arguments = {"callbacks": list(callbacks), **(trainer or {})}
    brain.fit(counter, train_set(), loader(), trainer=arguments)
    return brain


def cut_run(folder: Path, *callbacks: Callback, **kwargs: Any) -> None:
    with pytest.raises(Cut):
        run(folder, *callbacks, **kwargs)


class Cuts(Callback):
    """Interrupts the run at the n-th call of a hook."""

    def __init__(self, hook: str, call: int = 1) -> None:
        self.left = call
        setattr(self, hook, self.act)

    def act(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Cut


# ------------------------------------- hooks after a recipe's save are called on resume


@pytest.mark.parametrize("epoch", [2, 3, 4, 5])
@pytest.mark.parametrize("steps", [0, 5])
def test_early_stopping_counts_the_validation_after_which_a_recipe_saved(
    tmp_path: Path, epoch: int, steps: int
) -> None:
    def stopper() -> EarlyStopping:
        return EarlyStopping("error", patience=3)

    expected, found = stopper(), stopper()
    whole = run(tmp_path / "whole", expected, ckpt_interval_steps=steps)
    cut_run(tmp_path / "cut", stopper(), cut=at(epoch, 2), ckpt_interval_steps=steps)
    resumed = run(tmp_path / "cut", found, ckpt_interval_steps=steps)
    assert whole.hparams.epoch_counter.current == 5
    assert resumed.hparams.epoch_counter.current == 5
    assert found.state_dict() == expected.state_dict()
    assert_same(whole, resumed)


def test_early_stopping_stops_where_its_check_was_the_last_thing_to_do(tmp_path: Path) -> None:
    """The run is interrupted between the recipe's save and the check that would end it."""
    cut_run(tmp_path, Cuts("on_validation_end", 5), EarlyStopping("error", patience=3))
    stopper = EarlyStopping("error", patience=3)
    resumed = run(tmp_path, stopper)
    assert resumed.hparams.epoch_counter.current == 5
    assert stopper.wait_count == 3
    assert not [event for event in resumed.hparams.events if event[0] == "batch"]


def best_in(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}-{error:.2f}", "error", save_top_k=2)


def ranking(callback: ModelCheckpoint) -> list[tuple[str, float]]:
    files = callback.best_k_models.items()
    return sorted((Path(path).name, float(score)) for path, score in files)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_model_checkpoint_ranks_the_validation_after_which_a_recipe_saved(
    tmp_path: Path, epoch: int
) -> None:
    """The run is interrupted after the recipe's save, before the callback is called."""
    expected, found = best_in(tmp_path / "whole-best"), best_in(tmp_path / "best")
    run(tmp_path / "whole", expected)
    first = [Cuts("on_validation_end", epoch), best_in(tmp_path / "best")]
    cut_run(tmp_path / "cut", *first)
    run(tmp_path / "cut", found)
    assert found.best_model_score == expected.best_model_score == torch.tensor(0.4)
    assert Path(found.best_model_path).name == Path(expected.best_model_path).name
    assert ranking(found) == ranking(expected)
    files = sorted(path.name for path in (tmp_path / "best").iterdir())
    assert files == [name for name, _ in ranking(expected)]


def test_model_checkpoint_writes_its_file_again(tmp_path: Path) -> None:
    """The file was written after the recipe's save and before the kill."""

    def files(folder: Path, cut: Any = None) -> list[str]:
        saver = ModelCheckpoint(folder / "best", monitor="valid_loss", save_top_k=2)
        try:
            run(folder, saver, cut=cut, epochs=3, trainer={"enable_checkpointing": True})
        except Cut:
            return []
        return sorted(path.name for path in (folder / "best").iterdir())

    expected = files(tmp_path / "whole")
    files(tmp_path / "cut", at(2, 3))
    assert files(tmp_path / "cut") == expected
    assert len(expected) == 2


def test_model_checkpoint_ranks_once_what_it_had_ranked_already(tmp_path: Path) -> None:
    """The run is interrupted in the next epoch, after the callback wrote its file."""
    expected, found = best_in(tmp_path / "whole-best"), best_in(tmp_path / "best")
    run(tmp_path / "whole", expected)
    cut_run(tmp_path / "cut", best_in(tmp_path / "best"), cut=at(4, 2))
    run(tmp_path / "cut", found)
    assert [score for _, score in ranking(found)] == [score for _, score in ranking(expected)]
    assert found.best_model_score == expected.best_model_score


class Remembers(Callback):
    """A user's callback whose state is the list of its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.calls.append(["epoch start", trainer.current_epoch])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.calls.append(["batch", trainer.current_epoch, trainer.fit_loop.batch_idx])

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.calls.append(["validated", trainer.current_epoch, metrics])

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.calls.append(["epoch end", trainer.current_epoch])

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@pytest.mark.parametrize("cut", [at(1, 7), at(2, 1), at(2, 8)], ids=["1-7", "2-1", "2-8"])
@pytest.mark.parametrize("saved", ["at ends", "everywhere"])
def test_each_hook_of_a_users_callback_is_called_once(
    tmp_path: Path, cut: Any, saved: str
) -> None:
    steps = 2 if saved == "everywhere" else 0
    expected, found = Remembers(), Remembers()
    run(tmp_path / "whole", expected, epochs=3, ckpt_interval_steps=steps)
    cut_run(tmp_path / "cut", Remembers(), epochs=3, cut=cut, ckpt_interval_steps=steps)
    run(tmp_path / "cut", found, epochs=3, ckpt_interval_steps=steps)
    assert found.calls == expected.calls
    assert len(found.calls) == 3 * (BATCHES + 3)


class Anneals(Planned):
    """A learning rate that changes with each epoch, after the save."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.optimizer.param_groups[0]["lr"] /= 2


@pytest.mark.parametrize("cut", [at(1, 7), at(2, 8)], ids=["1-7", "2-8"])
def test_the_rates_that_are_monitored_are_those_of_each_epoch(
    tmp_path: Path, cut: Any
) -> None:
    def rates(folder: str, cut: Any = None) -> list[float]:
        monitor = LearningRateMonitor("epoch")
        logger = CSVLogger(tmp_path, name="logs")
        kwargs = {"epochs": 3, "ckpt_interval_steps": 1, "trainer": {"logger": logger}}
        runs = cut_run if cut else run
        runs(tmp_path / folder, monitor, cut=cut, cls=Anneals, **kwargs)
        return list(itertools.chain(*monitor.lrs.values()))

    expected = rates("whole")
    assert rates("cut", cut) + rates("cut") == expected == [0.1, 0.05, 0.025]


# -------------------------------------------------------------- once an epoch, or a process


class CountsEpochs(Callback):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.epochs.append(trainer.current_epoch)


def test_an_epoch_starts_once_over_the_processes_of_a_run(tmp_path: Path) -> None:
    counts = [CountsEpochs(), CountsEpochs(), CountsEpochs()]
    options = {"epochs": 2, "ckpt_interval_steps": 1}
    cut_run(tmp_path, counts[0], cut=at(1, 4), **options)
    cut_run(tmp_path, counts[1], cut=at(1, 9), **options)
    run(tmp_path, counts[2], **options)
    assert [each.epochs for each in counts] == [[0], [], [1]]


def test_a_hook_that_raised_is_called_again(tmp_path: Path) -> None:
    class Raises(CountsEpochs):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            super().on_train_epoch_start(trainer, *args)
            raise Cut

    last = CountsEpochs()
    first, files = CountsEpochs(), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Cut):
        fit_with_trainer(brain_in(None), [first, Raises(), files])
    # The file identifies callbacks by the names of their classes.
    again = type("Raises", (CountsEpochs,), {"__qualname__": Raises.__qualname__})()
    fit_with_trainer(brain_in(None), [last, again, OnExceptionCheckpoint(tmp_path)], "last")
    assert first.epochs == [0]
    assert last.epochs == [1]
    assert again.epochs == [0, 1]


def test_a_hook_that_saves_counts_as_called(tmp_path: Path) -> None:
    class Saves(CountsEpochs):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            super().on_train_epoch_start(trainer, *args)
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "own.ckpt")

    whole, first = brain_in(None), Saves()
    fit_with_trainer(whole, [first])
    resumed, second = brain_in(None), Saves()
    fit_with_trainer(resumed, [second], tmp_path / "own.ckpt")
    assert (first.epochs, second.epochs) == ([0, 1], [])
    assert_same(whole, resumed)


class Backboned(Noisy):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.model(self.modules.backbone(batch[0]))

    def init_optimizers(self) -> None:
        self.optimizer = self.opt_class(self.modules.model.parameters())
        self.optimizers_dict = {"optimizer": self.optimizer}


@pytest.mark.parametrize("cut", [at(2, 1), at(2, 7)], ids=["2-1", "2-7"])
def test_a_backbone_is_thawed_once(tmp_path: Path, cut: Any) -> None:
    """It adds a parameter group at the start of an epoch; torch raises if added twice."""

    def brain(cut: Any = None) -> Noisy:
        new = brain_in(None)
        new.modules["backbone"] = torch.nn.Linear(4, 4)
        with torch.no_grad():
            new.modules.backbone.weight.fill_(0.1)
            new.modules.backbone.bias.fill_(0.0)
        new.__class__, new.cut = Backboned, cut
        return new

    def callbacks(folder: str) -> list[Callback]:
        thaw = BackboneFinetuning(1, backbone_initial_lr=0.01, verbose=False)
        return [thaw, OnExceptionCheckpoint(tmp_path / folder)]

    whole = brain()
    fit_with_trainer(whole, callbacks("whole"))
    with pytest.raises(Cut):
        fit_with_trainer(brain(cut), callbacks("cut"))
    resumed = brain()
    fit_with_trainer(resumed, callbacks("cut"), "last")
    assert len(resumed.optimizer.param_groups) == 2
    assert_same(whole, resumed)


@pytest.mark.parametrize("cut", [at(1, 7), at(2, 2), at(2, 8)], ids=["1-7", "2-2", "2-8"])
def test_accumulation_is_scheduled_in_each_process(tmp_path: Path, cut: Any) -> None:
    def scheduler() -> GradientAccumulationScheduler:
        return GradientAccumulationScheduler({0: 2, 1: 3})

    options = {"epochs": 2, "ckpt_interval_steps": 1}
    whole = run(tmp_path / "whole", scheduler(), **options)
    cut_run(tmp_path / "cut", scheduler(), cut=cut, **options)
    resumed = run(tmp_path / "cut", scheduler(), **options)
    assert whole.optimizer_step == BATCHES // 2 + BATCHES // 3
    assert_same(whole, resumed)
    batches = [event for event in whole.hparams.events if event[0] == "batch"]
    again = [event for event in resumed.hparams.events if event[0] == "batch"]
    assert again == batches[-len(again) :]


# The hook, and the number of its call, at which the run is interrupted.
PHASES = {
    "a batch": ("on_train_batch_end", BATCHES + 3),
    "a validation ends": ("on_validation_end", 2),
    "an epoch ends": ("on_train_epoch_end", 2),
}


BARS = [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_lightning("2.5.3"))]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("bar", BARS)
def test_a_bar_of_lightnings_is_drawn_in_each_process(
    tmp_path: Path, bar: Any, phase: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if bar is RichProgressBar:
        pytest.importorskip("rich")
    files = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Cut):
        fit_with_trainer(brain_in(None), [Cuts(*PHASES[phase]), files])
    capfd.readouterr()
    whole, resumed = brain_in(None), brain_in(None)
    fit_with_trainer(whole, [])
    callbacks = [bar(refresh_rate=1), OnExceptionCheckpoint(tmp_path)]
    fit_with_trainer(resumed, callbacks, "last", enable_progress_bar=True)
    shown = capfd.readouterr()
    assert "Epoch 2/2" in shown.out + shown.err or phase.endswith("ends")
    assert_same(whole, resumed)


# ------------------------------------------------------------------------------- copies


def test_hooks_of_a_copied_callback_are_always_called() -> None:
    copies: list[Any] = []

    class Copies(CountsEpochs):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            super().on_train_epoch_start(trainer, *args)
            copies.append(copy.deepcopy(watched))

    watched = CountsEpochs()
    brain = make()
    trainer_with(watched, Copies()).fit(to_lightning(brain), loader(), loader())
    assert len(copies) == 2
    for each in copies:
        assert type(each) is CountsEpochs
        each.epochs.clear()
        for _ in range(2):
            each.on_train_epoch_start(trainer_with())
        assert each.epochs == [0, 0]
    assert watched.epochs == [0, 1]


class Pickled(CountsEpochs):
    def __getstate__(self) -> dict[str, Any]:
        # Lightning gives each callback methods of the module.
        state = vars(self)
        return {name: value for name, value in state.items() if not name.startswith("log")}


def test_callbacks_are_pickled_without_what_watches_them() -> None:
    pickled: list[bytes] = []

    class Pickles(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pickled.append(pickle.dumps(watched))

    watched = Pickled()
    trainer_with(watched, Pickles(), max_epochs=1).fit(
        to_lightning(make()), loader(), loader()
    )
    again = pickle.loads(pickled[-1])  # noqa: S301
    assert type(again) is Pickled
    for _ in range(2):
        again.on_train_epoch_start(trainer_with())
    assert again.epochs == [0, 0, 0]


def test_after_a_run_callbacks_are_what_they_were() -> None:
    watched = Remembers()
    trainer_with(watched).fit(to_lightning(make()), loader(), loader())
    assert not {*EPOCH_HOOKS, *BATCH_HOOKS} & vars(watched).keys()
