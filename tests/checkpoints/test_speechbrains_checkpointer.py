"""Recipes that call a real SpeechBrain Checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from brain_lightning import Checkpointer as OwnCheckpointer
from brain_lightning import EpochCounter
from tests.parity.recipes import classifier, dataset, one_module
from tests.parity.sides import OURS, SPEECHBRAIN, Record, Side, assert_equal, attach, run

SHUFFLED = {"batch_size": 4, "shuffle": True}


def brain_with_checkpointer(
    side: Side, record: Record, folder: Path, cls: Any = Checkpointer, **run_opts: Any
) -> Any:
    """A Brain that saves at the end of each validation, and starts from random weights."""

    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            self.checkpointer.save_and_keep_only(meta={"loss": stage_loss}, min_keys=["loss"])

    modules = one_module()
    counter = side.EpochCounter(4)
    checkpointer = cls(folder, {"model": modules["model"], "counter": counter})
    brain = classifier(side, on_stage_end=on_stage_end)(
        modules,
        lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        {"epoch_counter": counter},
        {"device": "cpu", "noprogressbar": True, **run_opts},
        checkpointer,
    )
    attach(record, brain)
    return brain


def fit(brain: Any) -> None:
    brain.fit(
        brain.hparams.epoch_counter, dataset(), dataset(),
        train_loader_kwargs=SHUFFLED, valid_loader_kwargs={"batch_size": 5},
    )  # fmt: skip


def stop_at(brain: Any, optimizer_step: int) -> None:
    """Makes the Brain fail after a number of updates."""
    wrapped = brain.on_fit_batch_end

    def on_fit_batch_end(*args: Any) -> None:
        wrapped(*args)
        if brain.optimizer_step == optimizer_step:
            raise RuntimeError("power cut")

    brain.on_fit_batch_end = on_fit_batch_end


def test_the_best_checkpoint_is_evaluated(tmp_path: Path) -> None:
    def scenario(side: Side, record: Record) -> Any:
        brain = brain_with_checkpointer(side, record, tmp_path / side.name)
        fit(brain)
        record.results.append(brain.evaluate(dataset(), min_key="loss"))
        record.results.append(brain.optimizer_step)
        return brain

    ours, _ = run(OURS, scenario)
    theirs, _ = run(SPEECHBRAIN, scenario)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("cut_after", [5, 7, 10])
def test_a_run_that_was_cut_goes_on_as_in_speechbrain(tmp_path: Path, cut_after: int) -> None:
    """Interrupts at the end of an epoch, within an epoch, and after its last batch."""

    def scenario(side: Side, record: Record) -> Any:
        folder = tmp_path / side.name
        first = brain_with_checkpointer(side, record, folder, ckpt_interval_steps=1)
        stop_at(first, cut_after + 1)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(first)
        second = brain_with_checkpointer(side, record, folder)
        fit(second)
        record.results.append(second.optimizer_step)
        return second

    ours, resumed = run(OURS, scenario)
    theirs, _ = run(SPEECHBRAIN, scenario)
    assert_equal(ours, theirs, random=False)
    uninterrupted, _ = run(OURS, lambda side, record: _whole(side, record, tmp_path / "whole"))
    for name, tensor in resumed.modules.state_dict().items():
        assert torch.equal(tensor, uninterrupted.tensors[-1][name])


def _whole(side: Side, record: Record, folder: Path) -> Any:
    brain = brain_with_checkpointer(side, record, folder)
    fit(brain)
    return brain


@pytest.mark.filterwarnings("ignore:.*brain_lightning")
@pytest.mark.parametrize(("first", "second"), [(OURS, SPEECHBRAIN), (SPEECHBRAIN, OURS)])
def test_each_side_goes_on_from_the_others_checkpoint(
    tmp_path: Path, first: Side, second: Side
) -> None:
    def scenario(side: Side, record: Record) -> Any:
        folder = tmp_path / side.name
        writer = first if side is OURS else second
        cut = brain_with_checkpointer(writer, record, folder, ckpt_interval_steps=3)
        stop_at(cut, 9)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(cut)
        brain = brain_with_checkpointer(second, record, folder)
        fit(brain)
        return brain

    crossed, _ = run(OURS, scenario)
    straight, _ = run(SPEECHBRAIN, scenario)
    assert_equal(crossed, straight, random=False)


@pytest.mark.filterwarnings("ignore:.*'?brain_lightning'?")
@pytest.mark.parametrize(("first", "second"), [(OURS, SPEECHBRAIN), (SPEECHBRAIN, OURS)])
def test_each_side_goes_on_from_a_directory_of_the_others_own_checkpointer(
    tmp_path: Path, first: Side, second: Side
) -> None:
    """Files can be exchanged with SpeechBrain without importing SpeechBrain."""
    kinds = {OURS.name: OwnCheckpointer, SPEECHBRAIN.name: Checkpointer}

    def scenario(writer: Side, record: Record, folder: Path) -> Any:
        cut = brain_with_checkpointer(
            writer, record, folder, kinds[writer.name], ckpt_interval_steps=3
        )
        stop_at(cut, 9)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(cut)
        brain = brain_with_checkpointer(second, record, folder, kinds[second.name])
        fit(brain)
        return brain

    crossed, _ = run(OURS, lambda _, record: scenario(first, record, tmp_path / "crossed"))
    straight, _ = run(OURS, lambda _, record: scenario(second, record, tmp_path / "straight"))
    assert_equal(crossed, straight, random=False)
    fetched = [event for event in crossed.events if event[0] == "on_fit_batch_start"]
    assert fetched


def test_debug_mode_saves_in_a_temporary_directory(tmp_path: Path) -> None:
    brain = brain_with_checkpointer(OURS, Record(), tmp_path / "real", debug=True)
    fit(brain)
    assert list((tmp_path / "real").glob("CKPT*")) == []
    assert len(brain.checkpointer.list_checkpoints()) == 1
    kept = brain_with_checkpointer(
        OURS, Record(), tmp_path / "kept", debug=True, debug_persistently=True
    )
    fit(kept)
    assert len(list((tmp_path / "kept").glob("CKPT*"))) == 1


def test_a_counter_is_saved_and_recovered_by_speechbrain(tmp_path: Path) -> None:
    brain = brain_with_checkpointer(OURS, Record(), tmp_path)
    fit(brain)
    counter = EpochCounter(4)
    Checkpointer(tmp_path, {"counter": counter}, allow_partial_load=True).recover_if_possible()
    assert counter.current == 4


def test_a_counter_alone_is_saved_by_speechbrain(tmp_path: Path) -> None:
    counter = EpochCounter(4)
    next(counter)
    Checkpointer(tmp_path, {"counter": counter}).save_checkpoint()
    other = EpochCounter(4)
    Checkpointer(tmp_path, {"counter": other}).recover_if_possible()
    assert other.current == 1
