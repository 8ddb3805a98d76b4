"""Saves on an asynchronous device: whether the host waits, and the content of the files."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brain_lightning import Brain, Checkpointer
from tests.support import fake_device
from tests.support.brains import Regression, all_equal, loader, make, weights
from tests.support.fake_device import DEVICE, Record, recorded

# The host waits once, to know whether all parameters are finite.
WAITS_OF_A_SAVE = 1


class Training:
    """A model with a tied weight that is trained and saved."""

    def __init__(self, async_save: bool) -> None:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        self.model = nn.Sequential(first, second).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.folder = Path(tempfile.mkdtemp())
        recoverables = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(self.folder, recoverables)
        self.checkpointer.async_save = async_save

    def step(self) -> None:
        self.model(torch.ones(3, 4, device=DEVICE)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, name: str) -> Record:
        """Saves. Training overwrites the saved tensors immediately afterwards."""
        with recorded() as record:
            self.checkpointer.save_checkpoint(name=name)
            self.step()
        return record

    def file(self, name: str, of: str = "model") -> bytes:
        self.checkpointer.wait()
        return (self.folder / f"CKPT+{name}" / f"{of}.ckpt").read_bytes()


def training_continues_while_a_save_is_copied() -> None:
    module: Any = torch.fake
    for room in (1 << 30, 0):
        module.mem_get_info = lambda device=None, room=room: (room, 1 << 30)
        torch.manual_seed(1)
        training = Training(async_save=True)
        training.step()
        states = []
        for name in ("one", "two", "three"):
            states.append(copy.deepcopy(training.model.state_dict()))
            record = training.save(name)
            beside = {stream for what, stream in record.calls if what == "to host"} - {0}
            assert len(record.waits_of("MainThread")) == WAITS_OF_A_SAVE
            assert len(beside) == 1
            # If there is no memory for a clone, the device waits for the copy.
            waits = torch.accelerator.current_stream().clock.keys() >= beside
            assert waits is (room == 0)
            assert not training.checkpointer._copies._clones or room
        for name, state in zip(("one", "two", "three"), states, strict=True):
            training.file(name)
            loaded = torch.load(training.folder / f"CKPT+{name}" / "model.ckpt")
            assert {each.device.type for each in loaded.values()} == {"cpu"}
            assert all(torch.equal(loaded[key], state[key].cpu()) for key in state)
            assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()
        assert not torch.equal(states[0]["0.weight"].cpu(), states[1]["0.weight"].cpu())


def a_synchronous_save_waits_once_for_each_file_and_writes_the_same() -> None:
    files = []
    for async_save in (False, True):
        torch.manual_seed(1)
        training = Training(async_save)
        training.step()
        record = training.save("one")
        files.append([training.file("one", of) for of in ("model", "optimizer")])
        if not async_save:
            assert len(record.waits) == WAITS_OF_A_SAVE + 2
    assert files[0] == files[1]


def a_state_that_is_not_finite_is_not_saved() -> None:
    training = Training(async_save=True)
    training.step()
    training.save("good")
    with torch.no_grad():
        training.model[0].bias[1] = torch.nan
    training.save("bad")
    assert [each.path.name for each in training.checkpointer.list_checkpoints()] == [
        "CKPT+good"
    ]


class Stops(Regression):
    """Interrupts the run in the tenth batch."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        if self.step == 10:
            raise KeyboardInterrupt


def fit(folder: str, cls: type[Brain] = Regression, **options: Any) -> Any:
    def adam(parameters: Any) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=0.1)

    brain = make(cls, adam, checkpointer=Checkpointer(folder), device=DEVICE, **options)
    brain.checkpointer.add_recoverable("model", brain.modules.model)
    try:
        brain.fit(range(2), loader(48), trainer=fake_device.trainer())
    except KeyboardInterrupt:
        brain.checkpointer.wait()
    return brain


def a_run_that_was_saved_in_the_background_resumes_bit_for_bit() -> None:
    options = {"async_save": True, "ckpt_interval_steps": 4, "grad_accumulation_factor": 3}
    whole = fit(tempfile.mkdtemp(), **options)
    folder = tempfile.mkdtemp()
    fit(folder, Stops, **options)
    resumed = fit(folder, **options)
    assert resumed.optimizer_step == whole.optimizer_step == 8
    assert all_equal([w.cpu() for w in weights(resumed)], [w.cpu() for w in weights(whole)])
    assert not all_equal([w.cpu() for w in weights(whole)], weights(make()))


def test_on_a_device() -> None:
    fake_device.check(
        training_continues_while_a_save_is_copied,
        a_synchronous_save_waits_once_for_each_file_and_writes_the_same,
        a_state_that_is_not_finite_is_not_saved,
        a_run_that_was_saved_in_the_background_resumes_bit_for_bit,
    )
