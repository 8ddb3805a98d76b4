"""How often the host waits for the device in a step, on a device that counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import fake_device
from tests.support.brains import Manual, Regression, all_equal, loader, make, weights
from tests.support.fake_device import DEVICE, recorded

WAITS_PER_STEP = 2


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.1)


def fit(device: str, steps: int, cls: type[Regression] = Regression) -> Any:
    brain = make(cls, adam, device=device)
    trainer = fake_device.trainer() if device == DEVICE else {}
    brain.fit(range(1), loader(4 * steps), loader(8), trainer=trainer)
    return brain


def waits_per_step(cls: type[Regression] = Regression) -> float:
    """What a step adds to the waits of a fit."""
    waits = []
    for steps in (3, 13):
        with recorded() as record:
            fit(DEVICE, steps, cls)
        waits.append(len(record.waits_of("MainThread")))
    return (waits[1] - waits[0]) / 10


def a_fit_learns_the_same_as_on_the_cpu() -> None:
    for cls in (Regression, Manual):
        device, cpu = fit(DEVICE, 5, cls), fit("cpu", 5, cls)
        assert {w.device.type for w in device.modules.parameters()} == {"fake"}
        assert all_equal([w.cpu() for w in weights(device)], weights(cpu))
        assert not all_equal(weights(cpu), weights(make()))
        assert device.evaluate(loader(), trainer=fake_device.trainer()) == cpu.evaluate(
            loader()
        )


def the_host_waits_this_often() -> None:
    assert waits_per_step() == WAITS_PER_STEP
    assert waits_per_step(Manual) == 1


def what_is_read_too_early_is_garbage() -> None:
    there = torch.arange(4.0, device=DEVICE)
    with recorded() as record:
        here, event = there.to("cpu", non_blocking=True), torch.Event(DEVICE)
        numbers = torch.arange(3, device=DEVICE).to("cpu", non_blocking=True)
        event.record()
        assert here.isnan().all()
        assert not event.query()
        assert record.waits == []
        event.synchronize()
        assert here.tolist() == [0, 1, 2, 3]
        assert numbers.tolist() == [0, 1, 2]
        assert there.sum().item() == 6
    assert [wait.what for wait in record.waits] == ["Event.synchronize", "item"]


def two_streams_do_not_use_the_same_memory_at_a_time() -> None:
    side, tensor = torch.Stream(DEVICE), torch.zeros(2, device=DEVICE)
    with side, pytest.raises(RuntimeError, match="does not wait for stream 0"):
        tensor.add_(1)
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        tensor.add_(1)
    torch.accelerator.current_stream().wait_event(side.record_event())
    assert tensor.tolist() == [1, 1]


def test_on_a_device() -> None:
    fake_device.check(
        what_is_read_too_early_is_garbage,
        two_streams_do_not_use_the_same_memory_at_a_time,
        a_fit_learns_the_same_as_on_the_cpu,
        the_host_waits_this_often,
    )
