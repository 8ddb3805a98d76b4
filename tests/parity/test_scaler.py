"""One GradScaler for all optimizers: unscaled once, clipped, stepped, updated once.

On the CPU, where fp16 is refused, a scaler of the test's own takes the Brain's place and
everything stays in fp32; with a GPU the same scenarios run in fp16.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer
from torch import nn

from .recipes import CLASSES, FEATURES, adam, dataset, make
from .sides import OURS, SPEECHBRAIN, Record, Side, assert_equal, assert_moved, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def scaled_brain(side: Side, record: Record, device: str, **kwargs: Any) -> Any:
    """A Brain whose scaler is on, with an overflow in its third batch."""

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Any:
        record.results.append((self.scaler.get_scale(), self.scaler.state_dict()))
        loss = nn.functional.cross_entropy(predictions, batch[1].to(self.device))
        return loss * (1e30 if self.step == 3 and stage.name == "TRAIN" else 1)

    def compute_forward(self: Any, batch: Any, stage: Any) -> Any:
        return self.modules.head(self.modules.encoder(batch[0].to(self.device)))

    modules = {
        "encoder": nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2)),
        "head": nn.Linear(8, CLASSES),
    }
    options = {"device": device, **kwargs.pop("run_opts", {})}
    options |= {"precision": "fp16"} if device == "cuda" else {}
    methods = {"compute_forward": compute_forward, "compute_objectives": compute_objectives}
    brain = make(side, record, modules, run_opts=options, **{**methods, **kwargs})
    if device == "cpu":
        brain.scaler = torch.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    return brain


def init_two(self: Any) -> None:
    self.encoder_optimizer = adam(self.modules.encoder.parameters())
    self.head_optimizer = torch.optim.SGD(self.modules.head.parameters(), 0.1)
    self.optimizers_dict = {"encoder": self.encoder_optimizer, "head": self.head_optimizer}


def one_optimizer(side: Side, record: Record, device: str) -> Any:
    return scaled_brain(side, record, device)


def two_optimizers_accumulated_and_clipped(side: Side, record: Record, device: str) -> Any:
    options = {"grad_accumulation_factor": 2, "max_grad_norm": 0.1}
    return scaled_brain(side, record, device, run_opts=options, init_optimizers=init_two)


def one_of_two_frozen(side: Side, record: Record, device: str) -> Any:
    def freeze_optimizers(self: Any, optimizers: Any) -> Any:
        return {"head": optimizers["head"]} if self.step % 2 else optimizers

    return scaled_brain(
        side, record, device, init_optimizers=init_two, freeze_optimizers=freeze_optimizers
    )


def by_hand(side: Side, record: Record, device: str) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        with self.training_ctx:
            outputs = self.compute_forward(batch, side.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers_dict.values():
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers_dict.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.zero_grad()
        return loss.detach().cpu()

    return scaled_brain(side, record, device, init_optimizers=init_two, fit_batch=fit_batch)


def other_precision_of_evaluation(side: Side, record: Record, device: str) -> Any:
    return scaled_brain(side, record, device, run_opts={"eval_precision": "bf16"})


SCENARIOS = [
    one_optimizer, two_optimizers_accumulated_and_clipped, one_of_two_frozen, by_hand,
    other_precision_of_evaluation,
]  # fmt: skip


def fitted(side: Side, record: Record, scenario: Any, device: str) -> Any:
    brain = scenario(side, record, device)
    kwargs = {"batch_size": 4, "shuffle": True}
    brain.fit(side.EpochCounter(3), dataset(), dataset(), train_loader_kwargs=kwargs)
    return brain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scaled_updates_are_speechbrains(scenario: Any, device: str) -> None:
    theirs, _ = run(SPEECHBRAIN, partial(fitted, scenario=scenario, device=device))
    ours, brain = run(OURS, partial(fitted, scenario=scenario, device=device))
    assert_equal(ours, theirs)
    assert_moved(ours)
    scales = {scale for scale, _ in ours.results}
    assert len(scales) > 1, "nothing overflowed or grew"
    assert brain.scaler.is_enabled()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_on_a_gpu_are_speechbrains() -> None:
    def scenario(side: Side, record: Record) -> Any:
        torch.compiler.reset()
        brain = scaled_brain(side, record, "cuda", run_opts={"compile": True})
        brain.fit(range(2), dataset(), dataset(), train_loader_kwargs={"batch_size": 5})
        return brain

    theirs, _ = run(SPEECHBRAIN, scenario)
    ours, brain = run(OURS, scenario)
    assert hasattr(brain.modules.head, "_orig_mod")
    assert ours.stage_losses == theirs.stage_losses
    assert_moved(ours)


@pytest.mark.parametrize("device", DEVICES)
def test_the_scalers_state_is_in_checkpoints(tmp_path: Path, device: str) -> None:
    def scenario(side: Side, record: Record) -> Any:
        brain = one_optimizer(side, record, device)
        checkpointer = Checkpointer(tmp_path / side.name, {"scaler": brain.scaler})
        brain.fit(range(1), dataset(), train_loader_kwargs={"batch_size": 4})
        checkpointer.save_checkpoint()
        other = one_optimizer(side, Record(), device)
        record.results.append(other.scaler.state_dict())
        checkpointer.add_recoverable("scaler", other.scaler)
        checkpointer.recover_if_possible()
        assert other.scaler.state_dict() != record.results[-1]
        record.results.append(other.scaler.state_dict())
        return brain

    ours, _ = run(OURS, scenario)
    theirs, _ = run(SPEECHBRAIN, scenario)
    assert ours.results == theirs.results
