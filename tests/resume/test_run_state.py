"""A run that is interrupted anywhere and resumed equals an uninterrupted run."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    WeightedRandomSampler,
)

from tests.support.brains import all_equal
from tests.support.processes import run_python
from tests.support.resuming import (
    BATCHES,
    Cut,
    Noise,
    Noisy,
    StatefulStream,
    Stream,
    assert_same,
    at,
    brain_in,
    cut_and_resumed,
    fit,
)
from tests.system.resume_kills import Setting, kill_trainings, quiet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),
]

# ------------------------------------------------------------------------ kills


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(workers=2, accumulation=3),
        Setting(workers=2, accumulation=3, augments="step", loader="speechbrain"),
        Setting(workers=0, accumulation=3, loader="speechbrain", saver="speechbrain"),
        Setting(workers=2, accumulation=3, saver="lightning"),
        Setting(accumulation=1, loader="speechbrain", saver="lightning"),
    ],
    ids=lambda setting: " ".join(str(setting).split()),
)
def test_killed_anywhere(setting: Setting, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    quiet()
    try:
        outcome = kill_trainings(setting, kills=3, seed=1, parent=tmp_path)
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    assert outcome.kills == 3
    assert outcome.clean, outcome


# ------------------------------------------------------------------------- data

LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noise(), 4, shuffle=True),
    "workers": lambda: DataLoader(Noise(), 4, shuffle=True, num_workers=2),
    "three workers": lambda: DataLoader(Noise(), 4, num_workers=3, prefetch_factor=3),
    "persistent workers": lambda: DataLoader(
        Noise(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "weighted": lambda: DataLoader(
        Noise(), 4, sampler=WeightedRandomSampler([1.0 + i % 5 for i in range(48)], 48)
    ),
    "replacement": lambda: DataLoader(
        Noise(), 4, sampler=RandomSampler(Noise(), replacement=True, num_samples=48)
    ),
    "generator": lambda: DataLoader(
        Noise(), 4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "batches of their own": lambda: DataLoader(
        Noise(), batch_sampler=[list(range(i, i + 4)) for i in range(0, 48, 4)]
    ),
    "no batches": lambda: DataLoader(Noise(BATCHES), None, num_workers=2, shuffle=True),
    "a list": lambda: list(DataLoader(Noise(), 4)),
}


@pytest.mark.parametrize("train", LOADERS)
def test_every_loader_goes_on_where_it_was(tmp_path: Path, train: str) -> None:
    make_train = LOADERS[train]
    if train == "a list":
        # All runs share this list.
        batches = make_train()
        make_train = lambda: batches  # noqa: E731
    assert_same(*cut_and_resumed(tmp_path, make_train, at(1, 6), at(2, 2), at(2, 12)))


def test_a_dynamic_batch_sampler_of_speechbrains(tmp_path: Path) -> None:
    from speechbrain.dataio.sampler import DynamicBatchSampler

    def train() -> Any:
        lengths = [1.0 + (7 * i) % 5 for i in range(48)]
        sampler = DynamicBatchSampler(
            Noise(), 12, num_buckets=3, lengths_list=lengths, shuffle=True
        )
        return DataLoader(Noise(), batch_sampler=sampler, num_workers=2)

    assert_same(*cut_and_resumed(tmp_path, train, at(2, 3)))


def test_a_dataset_for_which_the_brain_makes_the_loader(tmp_path: Path) -> None:
    def run(folder: str, cut: Any) -> Noisy:
        brain = brain_in(tmp_path / folder, ckpt_interval_steps=3, grad_accumulation_factor=4)
        brain.cut = cut
        return fit(brain, Noise(), train_loader_kwargs={"batch_size": 4, "shuffle": True})

    whole = run("whole", None)
    with pytest.raises(Cut):
        run("cut", at(2, 8))
    assert_same(whole, run("cut", None))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_skipped_example_is_loaded(tmp_path: Path, workers: int) -> None:
    dataset = Noise(4 * 1000)
    first = brain_in(tmp_path, ckpt_interval_steps=50)
    first.cut = at(1, 951)
    with pytest.raises(Cut):
        fit(first, DataLoader(dataset, 4))
    second = brain_in(tmp_path)
    second.hparams.epoch_counter.limit = 1
    dataset.loaded = []
    train = DataLoader(dataset, 4, num_workers=workers)
    seen = []
    on_fit_batch_start = second.on_fit_batch_start
    second.on_fit_batch_start = lambda *args: (
        seen.append(second.step),
        on_fit_batch_start(*args),
    )
    fit(second, train)
    assert seen == list(range(951, 1001))
    assert dataset.loaded == ([] if workers else list(range(3800, 4000)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_with_a_position_goes_on(tmp_path: Path, workers: int) -> None:
    def train() -> Any:
        return DataLoader(StatefulStream(), 4, num_workers=workers)

    assert_same(*cut_and_resumed(tmp_path, train, at(1, 6), at(2, 3), at(2, 12)))


def test_a_stream_without_a_position_begins_anew_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = brain_in(tmp_path, ckpt_interval_steps=1)
    first.cut = at(1, 6)
    with pytest.raises(Cut):
        fit(first, DataLoader(Stream(), 4))
    second = brain_in(tmp_path)
    fit(second, DataLoader(Stream(), 4))
    assert "Stream has no position that can be restored" in caplog.text
    assert "not after batch 5" in caplog.text
    steps = [event[1] for event in second.hparams.events if event[0] == "batch"]
    assert steps == [*range(6, 6 + BATCHES), *range(1, BATCHES + 1)]


def test_other_workers_than_before_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = brain_in(tmp_path, ckpt_interval_steps=1)
    first.cut = at(1, 6)
    with pytest.raises(Cut):
        fit(first, DataLoader(Noise(), 4, num_workers=2))
    fit(brain_in(tmp_path), DataLoader(Noise(), 4))
    assert "saved with num_workers=2, but num_workers is 0 now" in caplog.text


# ------------------------------------------------------- the rest of the state


def test_a_window_that_is_not_full_goes_on(tmp_path: Path) -> None:
    def train() -> Any:
        return DataLoader(Noise(), 4, shuffle=True)

    cuts = (at(1, 2), at(1, 8), at(2, 5))
    assert_same(*cut_and_resumed(tmp_path, train, *cuts, grad_accumulation_factor=3))


def test_an_epoch_that_was_saved_at_its_end_goes_on_too(tmp_path: Path) -> None:
    class SavesAtEnds(Noisy):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "VALID":
                self.checkpointer.save_and_keep_only()

    def run(folder: str, cut: Any) -> Noisy:
        brain = brain_in(tmp_path / folder, ckpt_interval_minutes=0)
        brain.__class__ = SavesAtEnds
        brain.cut = cut
        return fit(brain, DataLoader(Noise(), 4, shuffle=True, num_workers=1))

    whole = run("whole", None)
    with pytest.raises(Cut):
        run("cut", at(2, 5))
    assert_same(whole, run("cut", None))


def test_a_brain_that_lives_on_keeps_its_random_state(tmp_path: Path) -> None:
    """As in SpeechBrain, a second fit does not resume from the checkpoint of the first."""
    brain = brain_in(tmp_path, ckpt_interval_minutes=0)
    fit(brain, DataLoader(Noise(), 4, shuffle=True))
    brain.checkpointer.save_and_keep_only()
    torch.manual_seed(4)
    expected = torch.get_rng_state()
    brain.hparams.epoch_counter.limit += 1
    states = []
    brain.on_stage_start = lambda *_: states.append(torch.get_rng_state())
    fit(brain, DataLoader(Noise(), 4))
    assert torch.equal(states[0], expected)


def test_the_whole_trace_of_a_resumed_run(tmp_path: Path) -> None:
    first = brain_in(tmp_path, ckpt_interval_steps=4)
    first.cut = at(1, 10)
    with pytest.raises(Cut):
        fit(first, DataLoader(Noise(), 4))
    second = fit(brain_in(tmp_path), DataLoader(Noise(), 4))
    assert second.hparams.events == [
        ("start", "TRAIN", 1),
        *(("batch", step, True) for step in range(9, 13)),
        ("end", "TRAIN", 1),
        ("start", "VALID", 1),
        ("end", "VALID", 1),
        ("start", "TRAIN", 2),
        *(("batch", step, True) for step in range(1, 13)),
        ("end", "TRAIN", 2),
        ("start", "VALID", 2),
        ("end", "VALID", 2),
    ]


def test_one_that_was_saved_after_its_last_batch_has_no_batch_left(tmp_path: Path) -> None:
    first = brain_in(tmp_path, ckpt_interval_steps=1)

    def on_stage_end(*_: Any) -> None:
        raise Cut

    first.on_stage_end = on_stage_end
    with pytest.raises(Cut):
        fit(first, DataLoader(Noise(), 4))
    second = fit(brain_in(tmp_path), DataLoader(Noise(), 4))
    assert second.hparams.events[:4] == [
        ("start", "TRAIN", 1),
        ("end", "TRAIN", 1),
        ("start", "VALID", 1),
        ("end", "VALID", 1),
    ]
    assert second.optimizer_step == 2 * BATCHES


def test_what_an_epoch_has_gathered_is_restored(tmp_path: Path) -> None:
    from speechbrain.utils.metric_stats import MetricStats

    class Gathers(Noisy):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            super().on_stage_start(stage, epoch)
            if stage.name == "TRAIN":
                self.seen: list[Any] = []
                self.stats = MetricStats(lambda x: x.flatten())
                self.count = 0

        def on_fit_batch_end(self, batch: Any, *args: Any) -> None:
            self.seen.append((self.step, batch[0].mean()))
            self.stats.append([str(self.step)], x=batch[0].mean())
            self.hparams.stats.append([str(self.step)], x=batch[0].mean())
            self.count += 1
            super().on_fit_batch_end(batch, *args)

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "TRAIN" and epoch == 1:
                mine = [self.stats.summarize("average"), *self.hparams.stats.ids, self.count]
                self.summary = [self.seen, mine, stage_loss]

    def run(folder: str, cut: Any) -> Any:
        brain: Any = brain_in(tmp_path / folder, ckpt_interval_steps=4)
        brain.__class__ = Gathers
        brain.hparams.stats = MetricStats(lambda x: x.flatten())
        brain.cut = cut
        fit(brain, DataLoader(Noise(), 4))
        return brain.summary

    whole = run("whole", None)
    with pytest.raises(Cut):
        run("cut", at(1, 7))
    assert run("cut", None) == whole
    assert [step for step, _ in whole[0]] == list(range(1, 13))


def test_the_trainers_counts_and_callbacks_go_on(tmp_path: Path) -> None:
    class Monitored(Noisy):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "VALID":
                self.checkpointer.save_and_keep_only()

    def run(folder: str, cut: Any) -> tuple[Any, EarlyStopping, list[Any]]:
        brain = brain_in(tmp_path / folder, ckpt_interval_steps=5)
        brain.__class__ = Monitored
        brain.cut = cut
        brain.hparams.epoch_counter.limit = 9
        # No loss improves by this much: training ends after one epoch and a patience of two.
        stopper = EarlyStopping("valid_loss", min_delta=100.0, patience=2)
        seen: list[Any] = []
        brain.on_fit_batch_start = lambda *_: seen.append(trainer_of())

        def trainer_of() -> Any:
            trainer = brain.seen_trainer
            return trainer.current_epoch, trainer.global_step, trainer.fit_loop.batch_idx

        class Tells(type(stopper).__mro__[1]):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                brain.__dict__["seen_trainer"] = trainer

        fit(brain, DataLoader(Noise(), 4), trainer={"callbacks": [stopper, Tells()]})
        return brain, stopper, seen

    whole, stopper, seen = run("whole", None)
    with pytest.raises(Cut):
        run("cut", at(2, 8))
    resumed, resumed_stopper, resumed_seen = run("cut", None)
    assert stopper.state_dict() == resumed_stopper.state_dict()
    assert whole.hparams.epoch_counter.current == 3
    assert resumed_seen == seen[BATCHES + 5 :]
    assert_same(whole, resumed)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_save_right_after_a_batch_of_nan_is_finite(
    tmp_path: Path, accumulation: int
) -> None:
    brain = brain_in(tmp_path, ckpt_interval_steps=1, grad_accumulation_factor=accumulation)
    brain.nan_at, brain.cut = 3, at(1, 4)
    with pytest.raises(Cut):
        fit(brain, DataLoader(Noise(), 4))
    assert brain.nonfinite_count == 1
    assert all(torch.isfinite(p).all() for p in brain.modules.parameters())
    saved = brain_in(tmp_path)
    saved.on_fit_start()
    assert saved.step == 3
    assert all(torch.isfinite(p).all() for p in saved.modules.parameters())
    resumed = brain_in(tmp_path)
    resumed.cut = lambda resumed: resumed.nonfinite_count == 1
    with pytest.raises(Cut):
        fit(resumed, DataLoader(Noise(), 4))


def test_a_failed_batch_of_a_living_brain_is_fitted_again(tmp_path: Path) -> None:
    """After Ctrl-C, as in a notebook: weights and position are those of the checkpoint."""
    whole = fit(brain_in(tmp_path / "whole"), DataLoader(Noise(), 4, shuffle=True))
    brain = brain_in(tmp_path / "cut", ckpt_interval_steps=1)
    brain.cut = at(1, 7)
    train = DataLoader(Noise(), 4, shuffle=True)
    with pytest.raises(Cut):
        fit(brain, train)
    brain.cut = None
    assert_same(whole, fit(brain, train))


# ---------------------------------------------------------------------- SIGTERM

SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from tests.support.brains import weights
from tests.support.resuming import *

class Told(Noisy):
    def on_fit_batch_start(self, *_):
        if self.told == (self.hparams.epoch_counter.current, "TRAIN", self.step):
            os.kill(os.getpid(), signal.SIGTERM)
    def evaluate_batch(self, batch, stage):
        if self.told == (self.hparams.epoch_counter.current, "VALID", self.step):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluate_batch(batch, stage)

brain = brain_in(Path(sys.argv[1]), ckpt_interval_minutes=0, grad_accumulation_factor=4)
brain.__class__ = Told
brain.told = eval(sys.argv[2])
fit(brain, DataLoader(Noise(), 4, shuffle=True, num_workers=2))
torch.save([weights(brain), brain.optimizer_step], sys.argv[3])
"""


def run_script(folder: Path, told: object) -> tuple[int, Path]:
    out = folder / "weights.pt"
    done = run_python("-W", "ignore", "-c", SCRIPT, str(folder), repr(told), str(out))
    assert done.returncode in (0, 143), done.stderr
    return done.returncode, out


@pytest.mark.parametrize("told", [(1, "TRAIN", 6), (2, "VALID", 2)], ids=["TRAIN", "VALID"])
def test_sigterm_saves_and_the_status_is_not_zero(tmp_path: Path, told: Any) -> None:
    status, whole = run_script(tmp_path / "whole", None)
    assert status == 0
    status, out = run_script(tmp_path / "cut", told)
    assert status == 128 + signal.SIGTERM
    assert not out.exists()
    (saved,) = (tmp_path / "cut").glob("CKPT*")
    assert "end-of-epoch: false" in (saved / "CKPT.yaml").read_text()
    status, out = run_script(tmp_path / "cut", None)
    assert status == 0
    (expected, updates), (found, found_updates) = torch.load(whole), torch.load(out)
    assert all_equal(expected, found)
    assert updates == found_updates


class Outcome:
    """An object that cannot be loaded without running code."""

    def __init__(self, loss: float) -> None:
        self.loss = loss


@pytest.mark.parametrize("kind", [Outcome, float])
def test_what_the_end_of_training_made_is_there_after_a_kill_in_validation(
    tmp_path: Path, kind: Any
) -> None:
    """The hook is called again only if it assigned a value that cannot be saved."""

    class Remembers(Noisy):
        ends: Any = None

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "TRAIN":
                self.outcome = kind(stage_loss)
            else:
                self.hparams.events.append(getattr(self.outcome, "loss", self.outcome))

        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            if self.ends is not None and self.ends(self):
                self.checkpointer.save_checkpoint(end_of_epoch=False)
                raise Cut
            return super().evaluate_batch(batch, stage)

    def run(folder: str, ends: Any) -> Noisy:
        brain = brain_in(tmp_path / folder, ckpt_interval_minutes=0)
        brain.__class__ = Remembers
        brain.ends = ends  # type: ignore[attr-defined]
        return fit(brain, DataLoader(Noise(), 4, shuffle=True))

    whole = run("whole", None)
    with pytest.raises(Cut):
        run("cut", at(2, 1))
    resumed = run("cut", None)
    assert_same(whole, resumed)
    assert resumed.hparams.events[-1] == whole.hparams.events[-1]
    ends = [event for event in resumed.hparams.events if event == ("end", "TRAIN", 2)]
    assert len(ends) == (kind is Outcome)
