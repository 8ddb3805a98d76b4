"""How often the host waits for the device in a step, on a fake device that counts waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from brain_lightning.errors import NonFiniteLossError
from tests.support import fake_device
from tests.support.brains import Manual, Regression, all_equal, loader, make, weights
from tests.support.fake_device import DEVICE, recorded


class Supered(Regression):
    """Overrides fit_batch and calls the default."""

    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class Checked(Regression):
    """Reads its losses itself."""

    def check_loss_isfinite(self, loss: Any) -> None:
        self.checked = [*getattr(self, "checked", []), loss.item()]
        super().check_loss_isfinite(loss)


class Watched(Regression):
    """Records the number of waits at its forward and its backward passes."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), len(self.waits())]
        predictions.register_hook(lambda _: self.seen.append(len(self.waits())))
        return super().compute_objectives(predictions, batch, stage)


class Weighed(Regression):
    """Weighs batches by a number that its loss computes on the device."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.targets = torch.ones_like(predictions).sum() + self.step
        return super().compute_objectives(predictions, batch, stage)

    def loss_weight(self, batch: Any) -> Any:
        return self.targets if self.step % 2 else len(batch[0])


class Averaged(Regression):
    """Averages its losses itself, also in evaluation."""

    def update_average(self, loss: Any, avg_loss: float) -> float:
        assert loss.is_cpu
        return max(avg_loss, loss.item())


class Poisoned(Regression):
    """Some of its losses are not finite."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * float("nan") if self.step in (2, 5) else loss

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.losses = [*getattr(self, "losses", []), stage_loss]


class Gathering(Poisoned):
    """Steps two optimizers itself, one of a layer outside of modules. Changes the loss."""

    def init_optimizers(self) -> None:
        self.layer = nn.Linear(2, 2).to(self.device)
        with torch.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.fill_(0.5)
        self.optimizers_dict = {"bias": adam([self.modules.model.bias])}
        self.own = [adam([self.modules.model.weight])]
        self.hidden = SimpleNamespace(optimizer=adam(self.layer.parameters()))

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.layer(super().compute_forward(batch, stage))

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if should_step:
            self.hidden.optimizer.step()
            self.hidden.optimizer.zero_grad()
        # Gradients exist before one of the batches with a NaN loss, but not before the other.
        if self.step in (1, 3, 6):
            self.own[0].step()
            self.own[0].zero_grad()
        with torch.no_grad():
            loss.mul_(2)


class Forgiving(Poisoned):
    """Continues after the patience is exhausted."""

    def fit_batch(self, batch: Any) -> Any:
        try:
            return super().fit_batch(batch)
        except NonFiniteLossError:
            return torch.tensor(1.0)


TOKENS = {"accumulate_by": "tokens", "grad_accumulation_factor": 2}


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.1)


def fit(device: str, steps: int, cls: type[Regression] = Regression, **run_opts: Any) -> Any:
    brain = make(cls, adam, device=device, **run_opts)
    trainer = fake_device.trainer() if device == DEVICE else {}
    brain.fit(range(1), loader(4 * steps), loader(4 * steps), trainer=trainer)
    return brain


def waits_per_step(cls: type[Regression] = Regression, **run_opts: Any) -> float:
    """Returns the number of waits that a training step and a validation batch add to a fit."""
    waits = []
    for steps in (3, 13):
        with recorded() as record:
            fit(DEVICE, steps, cls, **run_opts)
        waits.append(len(record.waits_of("MainThread")))
    return (waits[1] - waits[0]) / 10


def a_fit_learns_the_same_as_on_the_cpu() -> None:
    for cls in (Regression, Manual, Supered, Checked, Averaged, Weighed):
        options = TOKENS if cls is Weighed else {}
        device, cpu = fit(DEVICE, 5, cls, **options), fit("cpu", 5, cls, **options)
        assert {w.device.type for w in device.modules.parameters()} == {"fake"}
        assert all_equal([w.cpu() for w in weights(device)], weights(cpu))
        assert not all_equal(weights(cpu), weights(make()))
        assert device.evaluate(loader(), trainer=fake_device.trainer()) == cpu.evaluate(
            loader()
        )


def the_host_waits_once_a_step_and_never_in_a_validation() -> None:
    assert waits_per_step() == 1
    assert waits_per_step(Supered) == 1
    assert waits_per_step(grad_accumulation_factor=2) == 1
    assert waits_per_step(Weighed, **TOKENS) == 1
    # The loss that an overridden fit_batch returns is on the device.
    assert waits_per_step(Manual) == 1
    # The recipe and SpeechBrain read each training loss, and each validation loss is read.
    assert waits_per_step(Checked) == 3
    assert waits_per_step(Averaged) == 2


def the_backward_pass_is_queued_before_the_host_waits() -> None:
    with recorded() as record:
        brain = make(Watched, adam, device=DEVICE)
        brain.waits = record.waits_of
        brain.fit(range(1), loader(8), trainer=fake_device.trainer())
    (first, second), (third, fourth) = brain.seen[:2], brain.seen[2:]
    assert first == second < third == fourth
    # Only for the loss, which is not scaled.
    assert [what for what, _ in record.calls].count("to host") == 2


def a_loss_that_is_not_finite_leaves_the_weights_as_on_the_cpu() -> None:
    for run_opts in ({"nonfinite_patience": 9}, {"grad_accumulation_factor": 2}):
        on = {device: fit(device, 7, Poisoned, **run_opts) for device in (DEVICE, "cpu")}
        device, cpu = on[DEVICE], on["cpu"]
        assert all_equal([w.cpu() for w in weights(device)], weights(cpu))
        assert all(w.isfinite().all() for w in weights(cpu))
        assert not all_equal(weights(cpu), weights(make()))
        assert device.losses == cpu.losses
        assert device.nonfinite_count == cpu.nonfinite_count == 2
    with pytest.raises(NonFiniteLossError):
        fit(DEVICE, 7, Poisoned, nonfinite_patience=1)


def what_a_recipe_does_around_the_step_is_as_on_the_cpu() -> None:
    for cls, patience in ((Gathering, 9), (Forgiving, 0)):
        device, cpu = (fit(on, 7, cls, nonfinite_patience=patience) for on in (DEVICE, "cpu"))
        if cls is Gathering:
            assert torch.equal(device.layer.weight.cpu(), cpu.layer.weight)
            assert not torch.equal(cpu.layer.weight, torch.full((2, 2), 0.5))
        assert all_equal([w.cpu() for w in weights(device)], weights(cpu))
        assert not all_equal(weights(cpu), weights(make()))
        assert device.losses == cpu.losses


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
        the_host_waits_once_a_step_and_never_in_a_validation,
        the_backward_pass_is_queued_before_the_host_waits,
        a_loss_that_is_not_finite_leaves_the_weights_as_on_the_cpu,
        what_a_recipe_does_around_the_step_is_as_on_the_cpu,
    )
