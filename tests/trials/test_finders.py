"""Lightning's finders with a Brain: their results, and that they have no side effects."""

from __future__ import annotations

import inspect
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from speechbrain.dataio.sampler import DistributedSamplerWrapper as SpeechBrainWrapper
from speechbrain.dataio.sampler import DynamicBatchSampler
from torch.utils.data import DataLoader

from brain_lightning import UnsupportedError, to_lightning
from brain_lightning.data.batch_size import BatchSize
from brain_lightning.data.samplers import DistributedSamplerWrapper
from brain_lightning.trials import trial
from brain_lightning.trials.snapshot import Snapshot
from brain_lightning.trials.trial import Trial
from tests.parity.recipes import dataset
from tests.parity.sides import SPEECHBRAIN
from tests.support.brains import all_equal, trainer_with, weights

from .tried import GAN, ITEMS, MEMORY, SEARCHES, loaders, make, search


def margin(part: float) -> dict[str, Any]:
    """Returns an argument that exists since Lightning 2.6."""
    known = "margin" in inspect.signature(BatchSizeFinder).parameters
    return {"margin": part} if known else {}


KINDS: dict[str, dict[str, Any]] = {
    "ours": {},
    "speechbrain": {"side": SPEECHBRAIN},
    "gan": GAN,
}


@pytest.mark.parametrize("hooks", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_has_no_side_effects(tmp_path: Path, kind: str, hooks: Any) -> None:
    brain, watched, error = search(tmp_path, kind, **hooks)
    assert error is None, error
    assert len(watched.found) == 1
    assert watched.before == watched.after
    assert watched.before[0]["logged"] > 0
    assert [name for name, *_ in brain.ends] == ["TRAIN", "VALID"] * 2


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    KeyboardInterrupt(),
    OSError("a file is missing"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_that_fails_has_no_side_effects(
    tmp_path: Path, kind: str, error: BaseException
) -> None:
    _, watched, raised = search(tmp_path, kind, error=error)
    assert watched.before == watched.after
    assert watched.before[0]["logged"] > 0
    if kind == "size" and isinstance(error, torch.OutOfMemoryError):
        # Every size is too large, and BatchNorm needs two items.
        assert "more than 1 value per channel" in str(raised)
    else:
        assert raised is error or isinstance(raised.__context__, type(error))


def test_a_ctrl_c_waits_until_everything_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Snapshot):
        def restore(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super().restore()

    monkeypatch.setattr(trial, "Snapshot", Interrupted)
    _, watched, raised = search(tmp_path, "rate")
    assert watched.before == watched.after
    assert watched.before[0]["logged"] > 0
    assert not watched.found
    assert isinstance(getattr(raised, "__context__", None), KeyboardInterrupt)


def test_the_next_fit_trains_with_the_result_of_tuner(tmp_path: Path) -> None:
    brain, (train, valid) = make(tmp_path), loaders()
    module = to_lightning(brain, epoch_counter=range(1, 2))
    tuner = Tuner(trainer_with(max_epochs=1))
    found = tuner.lr_find(module, train, valid, min_lr=1e-4, num_training=25)
    assert brain.optimizer_step == 0
    size = tuner.scale_batch_size(module, train, valid, mode="binsearch", **margin(0.25))
    # The largest size that fits is 16.
    assert size == train.batch_size == (12 if margin(0.25) else 16)
    rates: list[float] = []
    brain.hparams.annealing = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer_with(max_epochs=1).fit(module, train, valid)
    assert rates == [found.suggestion()] * len(train)
    assert brain.hparams.lr == found.suggestion()


def test_out_of_memory_on_one_rank_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks would hang while they average gradients."""
    monkeypatch.setattr(Trial, "fails_together", False)
    _, watched, raised = search(tmp_path, "size")
    assert isinstance(raised, torch.OutOfMemoryError)
    assert watched.before == watched.after


def test_a_resumed_run_does_not_search_again(tmp_path: Path) -> None:
    """It continues with the result of its first search."""

    def fit(folder: Path, *steps: int) -> Any:
        for limit in steps:
            brain, (train, valid) = make(folder), loaders()
            brain.hparams.annealing = print
            finder = LearningRateFinder(1e-4, num_training_steps=25)
            trainer = trainer_with(finder, max_epochs=-1, max_steps=limit)
            trainer.fit(to_lightning(brain), train, valid)
        return finder, brain

    searched, whole = fit(tmp_path / "whole", 8)
    finder, resumed = fit(tmp_path / "resumed", 4, 8)
    assert getattr(finder, "optimal_lr", None) is None
    assert searched.optimal_lr is not None
    assert all_equal(weights(whole), weights(resumed))


def test_a_resumed_run_uses_the_size_that_was_found(tmp_path: Path) -> None:
    sizes: list[list[int]] = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
            sizes[-1].append(len(batch[0]))

    def fit(folder: Path, *steps: int) -> Any:
        for limit in steps:
            brain, (train, valid) = make(folder), loaders()
            brain.hparams.annealing = print
            sizes.append([])
            finder = BatchSizeFinder(init_val=6)
            limits = {"max_epochs": -1, "max_steps": limit, "val_check_interval": 0.5}
            trainer = trainer_with(finder, Sizes(), **limits)
            trainer.fit(to_lightning(brain), train, valid)
            # Half of the batches that the DataLoader has now.
            assert trainer.val_check_batch == len(train) // 2
            assert finder.optimal_batch_size == train.batch_size == 12
        return brain

    whole = fit(tmp_path / "whole", 6)
    resumed = fit(tmp_path / "resumed", 3, 6)
    assert sizes == [[12, 12, 12, 4, 12, 12], [12, 12, 12], [4, 12, 12]]
    assert all_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("buckets", [{"num_buckets": 4}, {"bucket_boundaries": [4.0, 8.0]}])
@pytest.mark.parametrize("wrapper", [SpeechBrainWrapper, DistributedSamplerWrapper])
def test_a_changed_dynamic_sampler_makes_the_same_batches_as_a_new_one(
    wrapper: Any, buckets: Any
) -> None:
    """Also with a DistributedSamplerWrapper, and if a boundary equals the batch length."""

    def make_sampler(length: float) -> Any:
        lengths = [1.0 + item % 7 for item in range(ITEMS)]
        sampler = DynamicBatchSampler(dataset(ITEMS), length, lengths_list=lengths, **buckets)
        return wrapper(sampler, num_replicas=2, rank=0, shuffle=False)

    sampler, expected = make_sampler(8), make_sampler(30)
    BatchSize(DataLoader(dataset(ITEMS), batch_sampler=sampler)).set(30.0)
    assert list(sampler) == list(expected) != list(make_sampler(8))
    assert len(sampler) == len(expected)


def test_the_batch_length_of_a_dynamic_sampler_is_searched(tmp_path: Path) -> None:
    brain, lengths = make(tmp_path), [1.0, 2.0] * 20
    sampler = DynamicBatchSampler(
        dataset(ITEMS), 8, bucket_boundaries=[1.0, 2.0], lengths_list=lengths, drop_last=True
    )
    loader = DataLoader(dataset(ITEMS), batch_sampler=sampler)
    finder = BatchSizeFinder(mode="binsearch", steps_per_trial=100, **margin(0.0))
    trainer_with(finder, max_epochs=1).fit(to_lightning(brain), loader, loader)
    assert max(map(len, sampler)) == MEMORY
    assert sampler._max_batch_length == finder.optimal_batch_size > 8
    again = DynamicBatchSampler(
        dataset(ITEMS),
        sampler._max_batch_length,
        bucket_boundaries=[1.0, 2.0],
        lengths_list=lengths,
    )
    assert sampler._bucket_lens == again._bucket_lens


def test_unsupported_searches_raise(tmp_path: Path) -> None:
    batches = DataLoader(dataset(ITEMS), batch_sampler=[[0, 1], [2, 3]])
    empty = DataLoader(dataset(ITEMS), batch_sampler=[])
    for finder, data, words in (
        (BatchSizeFinder(), batches, "of a DataLoader with a list cannot be changed"),
        (
            BatchSizeFinder(init_val=24, max_trials=1),
            loaders()[0],
            "none of the 1 tried sizes fits",
        ),
        (LearningRateFinder(), iter(batches), "can be iterated only once"),
        (LearningRateFinder(), empty, "needs at least one training batch"),
        (
            LearningRateFinder(attr_name="rate"),
            batches,
            "is not a hyperparameter of Classifier",
        ),
    ):
        with pytest.raises(UnsupportedError, match=words):
            trainer_with(finder, max_epochs=1).fit(
                to_lightning(make(tmp_path)), data, loaders()[1]
            )
