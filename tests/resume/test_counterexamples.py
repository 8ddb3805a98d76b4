"""Regression tests: counterexamples to exact resume that were found and fixed."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from speechbrain.nnet.RNN import LiGRU, SLiGRU
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from brain_lightning import Checkpointer, EpochCounter, to_lightning
from tests.support.brains import Regression, loader, make, trainer_with
from tests.support.resuming import (
    BATCHES,
    Cut,
    Noise,
    Noisy,
    StatefulStream,
    assert_same,
    at,
    brain_in,
    cut_and_resumed,
    fit,
    fit_with_trainer,
    seed,
    whole_and_resumed,
)
from tests.support.upstream import needs_lightning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class EndSaving(Noisy):
    """Saves at the end of each validation."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.checkpointer.save_and_keep_only()


def train_set(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Noise(), 4, shuffle=True, **kwargs)


PERSISTENT = {"num_workers": 2, "persistent_workers": True}


def run(
    folder: Path, cut: Any = None, cls: type[Noisy] = Noisy, valid: Any = None, **kwargs: Any
) -> Noisy:
    """Runs once, from the checkpoints in the folder."""
    options = {"ckpt_interval_steps": 1, **kwargs.pop("options", {})}
    brain = brain_in(folder, **options)
    brain.hparams.epoch_counter.limit = 3
    brain.__class__, brain.cut = cls, cut
    train = kwargs.pop("train", train_set)()
    seed(len(list(folder.glob("CKPT*"))))
    brain.fit(
        brain.hparams.epoch_counter, train, loader() if valid is None else valid(), **kwargs
    )
    return brain


def whole_and_cut(folder: Path, *cuts: Any, **kwargs: Any) -> tuple[Noisy, Noisy]:
    whole = run(folder / "whole", **kwargs)
    for cut in cuts:
        with pytest.raises(Cut):
            run(folder / "cut", cut, **kwargs)
    return whole, run(folder / "cut", **kwargs)


# ------------------------------------------------------------------- persistent workers


def persistent() -> DataLoader[Any]:
    return train_set(**PERSISTENT)


def test_persistent_workers_after_the_end_of_an_epoch(tmp_path: Path) -> None:
    options = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 0}
    assert_same(
        *whole_and_cut(tmp_path, at(2, 3), cls=EndSaving, train=persistent, options=options)
    )


def test_persistent_workers_cut_twice_in_an_epoch(tmp_path: Path) -> None:
    assert_same(*whole_and_cut(tmp_path, at(2, 6), at(2, 8), train=persistent))


@pytest.mark.parametrize("cls", [Noisy, EndSaving])
def test_persistent_workers_of_the_validation(tmp_path: Path, cls: Any) -> None:
    def valid() -> DataLoader[Any]:
        return DataLoader(Noise(8), 4, num_workers=1, persistent_workers=True)

    assert_same(*whole_and_cut(tmp_path, at(2, 6), cls=cls, valid=valid))


def test_a_generator_of_the_validations_own(tmp_path: Path) -> None:
    class Annealed(EndSaving):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.optimizer.param_groups[0]["lr"] = stage_loss / 10
            super().on_stage_end(stage, stage_loss, epoch)

    def valid() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(2)
        return DataLoader(Noise(8), 3, shuffle=True, drop_last=True, generator=generator)

    assert_same(*whole_and_cut(tmp_path, at(3, 2), cls=Annealed, valid=valid))


# ---------------------------------------------------- validations in the middle of epochs


def failing(brain: Any, hook: str, when: Any) -> None:
    original = getattr(brain, hook)

    def fails(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(brain, *args):
            raise Cut
        return result

    setattr(brain, hook, fails)


@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("evaluate_batch", lambda brain, *_: at(2, 2)(brain)),
        ("on_stage_end", lambda brain, stage, *_: stage.name == "VALID" and at(2, 0)(brain)),
        ("compute_forward", lambda brain, *args: len(args) == 2 and at(2, 6)(brain)),
        ("on_fit_batch_end", lambda brain, *_: at(2, 7)(brain)),
        ("on_stage_start", lambda brain, stage, *_: stage.name == "TRAIN" and at(2, 0)(brain)),
    ],
)
def test_a_failure_about_a_validation_within_the_epoch(
    tmp_path: Path, hook: str, when: Any
) -> None:
    options = {"grad_accumulation_factor": 4}
    arguments = {"val_check_interval": 5}
    whole = brain_in(None, **options)
    fit_with_trainer(whole, [], **arguments)
    first = brain_in(None, **options)
    failing(first, hook, when)
    with pytest.raises(Cut):
        fit_with_trainer(first, [OnExceptionCheckpoint(tmp_path)], **arguments)
    second = brain_in(None, **options)
    seed(77)
    fit_with_trainer(second, [OnExceptionCheckpoint(tmp_path)], "last", **arguments)
    assert_same(whole, second)


# ----------------------------------------------------------------- hooks that save


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("train", [train_set, persistent])
def test_saved_when_a_stage_starts(tmp_path: Path, epoch: int, train: Any) -> None:
    class Saving(Noisy):
        def on_stage_start(self, stage: Any, epoch_now: Any = None) -> None:
            super().on_stage_start(stage, epoch_now)
            if stage.name == "TRAIN" and epoch_now == epoch:
                self.checkpointer.save_and_keep_only(end_of_epoch=False)

    options = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 0}
    assert_same(
        *whole_and_cut(tmp_path, at(epoch, 2), cls=Saving, options=options, train=train)
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_saved_when_a_batch_has_given_its_gradients(tmp_path: Path, accumulation: int) -> None:
    class Saving(Noisy):
        def on_fit_batch_end(self, *args: Any) -> None:
            if at(2, 6)(self):
                self.checkpointer.save_and_keep_only(end_of_epoch=False)
            super().on_fit_batch_end(*args)

    options = {
        "ckpt_interval_minutes": 0, "ckpt_interval_steps": 0,
        "grad_accumulation_factor": accumulation,
    }  # fmt: skip
    assert_same(*whole_and_cut(tmp_path, at(2, 7), cls=Saving, options=options))


def test_the_best_is_recovered_in_the_middle_of_a_resumed_run(tmp_path: Path) -> None:
    class Best(Noisy):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "VALID":
                meta = {"epoch": -epoch}
                self.checkpointer.save_and_keep_only(meta=meta, max_keys=["epoch"])
                self.checkpointer.recover_if_possible(max_key="epoch")
                # The first checkpoint is recovered: without this the counter would never end.
                self.hparams.epoch_counter.current = epoch

    assert_same(*whole_and_cut(tmp_path, at(3, 2), cls=Best))


# ------------------------------------------------------------------------- data


class Lists(Dataset[Any]):
    """The first element of some samples is an empty list."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return [[] if index % 3 == 0 else [1.0], torch.full((4,), float(index)), torch.ones(2)]


def stacked(samples: list[Any]) -> Any:
    return torch.stack([s[1] for s in samples]), torch.stack([s[2] for s in samples])


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_begin_with_an_empty_list_are_trained_on(workers: int) -> None:
    brain = make(Regression)
    brain.fit(range(1), DataLoader(Lists(), 2, collate_fn=stacked, num_workers=workers))
    assert brain.optimizer_step == 3


class ManyAtOnce(Noise):
    """Loads all items of a batch in one call."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [torch.stack([self[index][part] for index in indices]) for part in (0, 1)]


def as_they_are(samples: Any) -> Any:
    return samples


def test_batches_that_are_loaded_at_once(tmp_path: Path) -> None:
    def train() -> DataLoader[Any]:
        return DataLoader(ManyAtOnce(), 4, shuffle=True, num_workers=2, collate_fn=as_they_are)

    assert_same(*cut_and_resumed(tmp_path, train, at(2, 6), at(2, 7)))


class Offset(StatefulStream):
    """Workers get a part of the data in worker_init_fn, as in torch's documentation."""

    offset = 0

    def __iter__(self) -> Iterator[Any]:
        for x, y in super().__iter__():
            yield x + self.offset, y


def tell_who(worker: int) -> None:
    dataset = get_worker_info().dataset
    assert isinstance(dataset, Offset)
    dataset.offset = worker


def test_a_worker_init_fn_that_changes_the_dataset(tmp_path: Path) -> None:
    def train() -> DataLoader[Any]:
        return DataLoader(Offset(), 4, num_workers=2, worker_init_fn=tell_who)

    assert_same(*cut_and_resumed(tmp_path, train, at(2, 6), at(2, 7)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_at_its_end_does_not_begin_anew(tmp_path: Path, workers: int) -> None:
    class Saving(Noisy):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "TRAIN" and epoch == 2:
                self.checkpointer.save_and_keep_only(end_of_epoch=False)
                if self.cut is not None:
                    raise Cut

    def train() -> DataLoader[Any]:
        return DataLoader(StatefulStream(), 4, num_workers=workers)

    options = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 0}
    never = at(99, 0)
    whole, resumed = whole_and_cut(tmp_path, never, cls=Saving, train=train, options=options)
    assert_same(whole, resumed)
    assert resumed.optimizer_step == 3 * BATCHES


class OwnGenerator(Dataset[Any]):
    """A dataset with indices, and with its own random generator, which it can save."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> Any:
        x = torch.from_numpy(self.generator.random(4)).float()
        return x + index / 48, x[:2]

    def state_dict(self) -> dict[str, Any]:
        return {"state": repr(self.generator.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = eval(state["state"])  # noqa: S307


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_with_indices_and_a_state(tmp_path: Path, workers: int) -> None:
    def train() -> DataLoader[Any]:
        return DataLoader(OwnGenerator(), 4, shuffle=True, num_workers=workers)

    assert_same(*cut_and_resumed(tmp_path, train, at(1, 7)))


class NotStateful(IterableDataset[Any]):
    """A stream without a state: a run that is not resumed does not need one."""

    def __iter__(self) -> Iterator[Any]:
        yield from (Noise()[index] for index in range(8))


def test_the_workers_of_a_stream_without_a_state(tmp_path: Path) -> None:
    brain = brain_in(tmp_path)
    fit(brain, DataLoader(NotStateful(), 4, num_workers=2))
    assert brain.optimizer_step == 2 * 4


# ------------------------------------------------------------------- what is gathered


def test_containers_and_metrics_within_metrics(tmp_path: Path) -> None:
    class Gathers(Noisy):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if stage.name == "TRAIN":
                self.named = collections.defaultdict(list)
                self.counted = collections.Counter()
                self.ordered = collections.OrderedDict(n=0)
                self.queue = collections.deque(maxlen=3)
                self.seen = set()
                self.sums = np.zeros(2)
                self.total = torch.zeros(())
                metrics = [torchmetrics.MeanMetric(), torchmetrics.MaxMetric()]
                self.metrics = torchmetrics.MetricCollection(metrics)

        def on_fit_batch_end(self, batch: Any, *args: Any) -> None:
            value = float(batch[0].mean())
            self.named["x"].append(value)
            self.counted[self.step % 3] += 1
            self.ordered["n"] += self.step
            self.queue.append(value)
            self.seen.add(self.step)
            self.sums += value
            self.total = self.total + value
            self.metrics.update(batch[0])
            self.nonfinite_patience += 1
            super().on_fit_batch_end(batch, *args)

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "TRAIN" and epoch == 1:
                found = {k: float(v) for k, v in self.metrics.compute().items()}
                self.hparams.events[:] = [
                    self.named, self.counted, self.ordered, list(self.queue), self.seen,
                    self.sums.tolist(), float(self.total), found, self.nonfinite_patience,
                ]  # fmt: skip
                assert type(self.named) is collections.defaultdict
                assert type(self.counted) is collections.Counter
                assert self.queue.maxlen == 3

    whole, resumed = whole_and_cut(tmp_path, at(1, 7), cls=Gathers)
    assert whole.hparams.events[:9] == resumed.hparams.events[:9]
    assert len(whole.hparams.events[0]["x"]) == BATCHES


# ---------------------------------------------------------------------- counters


def test_a_counter_that_nobody_has_registered(tmp_path: Path) -> None:
    def one(folder: Path, cut: Any = None) -> Noisy:
        brain = brain_in(None)
        brain.checkpointer = Checkpointer(folder, {"brain": brain})
        brain.ckpt_interval_steps, brain.cut = 1, cut
        brain.hparams.epoch_counter = EpochCounter(3)
        brain.fit(brain.hparams.epoch_counter, train_set(), loader())
        return brain

    whole = one(tmp_path / "whole")
    with pytest.raises(Cut):
        one(tmp_path / "cut", at(2, 7))
    resumed = one(tmp_path / "cut")
    assert_same(whole, resumed)
    assert resumed.optimizer_step == 3 * BATCHES


def test_epochs_of_another_run_are_not_counted_twice(tmp_path: Path) -> None:
    """As in SpeechBrain, a new run over a range starts with its first epoch."""

    def one(epochs: Any, cut: Any) -> Noisy:
        brain = brain_in(tmp_path, ckpt_interval_steps=1)
        brain.__class__ = EndSaving
        brain.cut = cut
        brain.fit(epochs, train_set(), loader())
        return brain

    one(range(1), None)
    with pytest.raises(Cut):
        one(range(2), lambda brain: brain.step == 5)
    resumed = one(range(2), None)
    started = [event[1:] for event in resumed.hparams.events if event[0] == "start"]
    assert started == [("TRAIN", 0), ("VALID", 0), ("TRAIN", 1), ("VALID", 1)]


# --------------------------------------------------------------------- Lightning's files


@needs_lightning("2.6")
def test_averaged_weights_go_on_from_a_lightning_checkpoint(tmp_path: Path) -> None:
    def averaging(folder: Path) -> list[Any]:
        return [
            callbacks.EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(folder, every_n_train_steps=5, save_last=True),
        ]

    whole, resumed, _ = whole_and_resumed(tmp_path, averaging, at(2, 6))
    assert_same(whole, resumed)


def test_a_callback_that_a_directory_cannot_hold_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brain = brain_in(tmp_path, ckpt_interval_steps=5)
    writing = callbacks.LambdaCallback(on_save_checkpoint=lambda *_: None)
    fit(brain, train_set(), trainer={"callbacks": [writing]})
    assert caplog.text.count("do not contain the full state of LambdaCallback") == 1


def test_a_teacher_beside_the_modules_is_in_the_file(tmp_path: Path) -> None:
    class Taught(Noisy):
        def on_fit_start(self) -> None:
            self.teacher = torch.nn.Linear(4, 2).requires_grad_(False)
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.zero_()
            super().on_fit_start()

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch, stage)
            return loss + (predictions - self.teacher(batch[0])).square().mean()

        def on_fit_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for mine, its in zip(
                    self.modules.model.parameters(), self.teacher.parameters(), strict=True
                ):
                    its.lerp_(mine, 0.1)
            super().on_fit_batch_end(*args)

    def callbacks(folder: Path) -> list[Any]:
        return [ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)]

    whole, resumed, _ = whole_and_resumed(tmp_path, callbacks, at(2, 6), cls=Taught)
    assert_same(whole, resumed)


def test_a_trainer_of_ones_own_listens_to_sigterm_only_while_it_trains(tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_with(ModelCheckpoint(tmp_path), enable_checkpointing=True)
    heard = []
    brain = make(Regression)
    brain.on_fit_batch_end = lambda *_: heard.append(signal.getsignal(signal.SIGTERM))
    trainer.fit(to_lightning(brain), loader(), loader())
    assert all("Termination" in repr(handler) for handler in heard)
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------- state that is in no state dict


class WithLiGRU(EndSaving):
    """Its LiGRU samples dropout masks in advance, and counts the masks that it has used."""

    rnn_class: Any = LiGRU

    def on_fit_start(self) -> None:
        with torch.random.fork_rng():
            rnn = self.rnn_class(4, input_shape=(4, 1, 4), dropout=0.5)
        # Masks are sampled again in the second epoch.
        (layer,), count = rnn.rnn, 10 * BATCHES
        layer.N_drop_masks, layer.drop_masks = count, layer.drop_masks[:count].clone()
        self.modules["rnn"] = rnn
        self.checkpointer.add_recoverable("rnn", rnn)
        super().on_fit_start()

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        outputs, _ = self.modules.rnn(batch[0].unsqueeze(1))
        return super().compute_forward([outputs.squeeze(1)], stage)


class WithSLiGRU(WithLiGRU):
    """Its masks are in a buffer that is not persistent."""

    rnn_class = SLiGRU


@pytest.mark.parametrize("cls", [WithLiGRU, WithSLiGRU])
@pytest.mark.parametrize("cut", [at(1, 3), at(3, 1)])
def test_attributes_and_buffers_of_modules_that_no_state_dict_has(
    tmp_path: Path, cut: Any, cls: Any
) -> None:
    whole, resumed = whole_and_cut(tmp_path, cut, cls=cls)
    assert_same(whole, resumed)
    (ours,), (theirs,) = whole.modules.rnn.rnn, resumed.modules.rnn.rnn
    assert ours.drop_mask_cnt == theirs.drop_mask_cnt > 0
    assert torch.equal(ours.drop_masks, theirs.drop_masks)


def test_a_number_that_a_new_start_sets_is_not_overridden(tmp_path: Path) -> None:
    class Scaled(EndSaving):
        factor = 1.0

        def on_fit_start(self) -> None:
            self.modules.model.factor = self.factor
            super().on_fit_start()

    with pytest.raises(Cut):
        run(tmp_path, at(2, 2), cls=Scaled)
    Scaled.factor = 2.0
    assert run(tmp_path, cls=Scaled).modules.model.factor == 2.0
