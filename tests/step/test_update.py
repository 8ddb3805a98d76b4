"""A non-finite loss: weights stay finite, patience counts, and then the run ends."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from brain_lightning import NonFiniteLossError
from tests.support.brains import Regression, all_equal, dataset, loader, make, sgd, weights


class NaNAt(Regression):
    """Its loss is NaN in the batches whose numbers are in ``steps``, in each epoch."""

    steps: tuple[int, ...] = ()

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * float("nan") if self.step in self.steps else loss

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.stepped = [*getattr(self, "stepped", []), should_step]


def nan_at(*steps: int) -> type[NaNAt]:
    return type("NaN", (NaNAt,), {"steps": steps})


def test_a_nan_batch_does_not_change_the_weights() -> None:
    brain, without = make(nan_at(3)), make()
    brain.fit(range(1), loader())
    batches = [dataset()[i : i + 4] for i in (0, 4, 12, 16)]
    without.fit(range(1), DataLoader(batches, batch_size=None))
    assert all_equal(weights(brain), weights(without))
    assert all(torch.isfinite(w).all() for w in weights(brain))
    assert not all_equal(weights(brain), weights(make()))
    assert brain.optimizer_step == 4
    assert brain.stepped == [True, True, False, True, True]
    assert brain.nonfinite_count == 1


def test_the_average_ignores_a_nan_batch() -> None:
    brain = make(nan_at(1, 2))
    losses: list[float] = []
    brain.on_stage_end = lambda stage, loss, epoch=None: losses.append(loss)
    brain.fit(range(1), loader())
    assert all(torch.isfinite(torch.tensor(losses)))


def test_with_accumulation_only_that_micro_batch_is_dropped() -> None:
    brain = make(nan_at(2), grad_accumulation_factor=3, max_grad_norm=0)
    brain.fit(range(1), loader(12))

    by_hand = make()
    optimizer = sgd(by_hand.modules.parameters())
    for start in (0, 8):
        batch = dataset(12)[start : start + 4]
        loss = by_hand.compute_objectives(by_hand.compute_forward(batch, None), batch, None)
        (loss / 3).backward()
    optimizer.step()
    assert all_equal(weights(brain), weights(by_hand))
    assert brain.optimizer_step == 1


def test_the_fourth_raises_and_the_log_names_the_step(caplog: Any) -> None:
    brain = make(nan_at(1, 2, 3, 5))
    with (
        caplog.at_level(logging.WARNING, "brain_lightning"),
        pytest.raises(NonFiniteLossError, match=r"nan at step 5.*patience=3 is exhausted"),
    ):
        brain.fit(range(1), loader())
    found = [r.message for r in caplog.records if "Loss is nan" in r.message]
    assert [m.split(",")[0] for m in found] == [f"Loss is nan at step {s}" for s in (1, 2, 3)]
    assert all(torch.isfinite(w).all() for w in weights(brain))
    assert brain.optimizer_step == 1


def test_the_log_names_the_batch_on_the_rank_whose_loss_is_not_finite(caplog: Any) -> None:
    class Named(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return super().compute_forward(batch["data"], stage)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch["data"], stage)
            return loss * float("inf") if "utt2" in batch["id"] else loss

    batches = [
        {"id": [f"utt{n}", f"utt{n + 1}"], "data": batch}
        for n, batch in zip((0, 2, 4), loader(), strict=False)
    ]
    brain = make(Named)
    brain.fit(range(1), batches, train_loader_kwargs={"batch_size": None})
    named = [message for message in caplog.messages if "batch.id" in message]
    assert named == ["The loss of batch.id ['utt2', 'utt3'] on rank 0 is not finite."]
    assert brain.optimizer_step == 2


def test_the_log_tells_whether_the_parameters_are_finite(caplog: Any) -> None:
    class Diverged(nan_at(2)):  # type: ignore[misc]
        def optimizers_step(self) -> None:
            super().optimizers_step()
            if self.optimizer_step == 2:
                self.modules.model.bias.data.fill_(torch.nan)

    brain = make(Diverged, nonfinite_patience=2)
    with pytest.raises(NonFiniteLossError, match="Parameters of model are not finite"):
        brain.fit(range(1), loader(24))
    skipped = [message for message in caplog.messages if "batch is skipped" in message]
    found = ["All parameters are finite" in message for message in skipped]
    assert found == [True, False]


def test_it_is_a_value_error_as_in_speechbrain() -> None:
    with pytest.raises(ValueError, match="patience"):
        make(nan_at(1), nonfinite_patience=0).fit(range(1), loader())


def test_patience_is_reset_in_each_epoch() -> None:
    brain = make(nan_at(1, 2, 3))
    brain.fit(range(3), loader())
    assert brain.nonfinite_count == 3
    assert brain.optimizer_step == 3 * 2


def test_a_negative_norm_disables_clipping() -> None:
    brain, without, plain = make(max_grad_norm=-1.0), make(max_grad_norm=0), make()
    for each in (brain, without):
        each.fit(range(2), loader())
    plain.opt_class = None
    optimizer = sgd(plain.modules.parameters())
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            plain.compute_objectives(
                plain.compute_forward(batch, None), batch, None
            ).backward()
            optimizer.step()
    assert all_equal(weights(brain), weights(without))
    assert all_equal(weights(brain), weights(plain))


def test_clipping_is_over_all_parameter_groups() -> None:
    def two_groups(parameters: Any) -> Any:
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight]}, {"params": [bias]}], lr=0.1)

    brain, one_group = make(opt_class=two_groups, max_grad_norm=0.01), make(max_grad_norm=0.01)
    for each in (brain, one_group):
        each.fit(range(1), loader())
    assert all_equal(weights(brain), weights(one_group))
