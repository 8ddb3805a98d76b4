"""What FSDP2 may do differently from DDP: runs in both, on our Brain and SpeechBrain's."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.utils.optimizers import rm_vector_weight_decay
from torch import Tensor, nn

from tests.parity.recipes import FEATURES, dataset, make
from tests.parity.sides import Record, Side

from . import sharded_searches
from .scenarios import GLOO, Stack, Statistics, encoder_and_head

# Scenarios of ``scenarios`` that are DDP's alone, and why.
LEFT_OUT = {
    "one_collective_a_batch": "counts collectives, and forward passes gather shards by some",
    "accumulation_counted": "counts DDP's all-reduces, by a hook that only DDP has",
    "evaluated_on_the_main_process_alone": "one process alone does not have the weights",
    "called_around_its_wrapper": "gradients are averaged, which DDP does not do",
}


def bf16_and_accumulation(side: Side, record: Record) -> Any:
    options = {**GLOO, "precision": "bf16", "grad_accumulation_factor": 2}
    brain = make(side, record, encoder_and_head(), run_opts=options)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 2})
    return brain


def clipped(side: Side, record: Record) -> Any:
    brain = make(side, record, encoder_and_head(), run_opts={**GLOO, "max_grad_norm": 0.01})
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def gradient_of_one_shard_not_finite(side: Side, record: Record) -> Any:
    """Of the first row of a weight, which the first process has."""

    def on_fit_batch_start(self: Any, batch: Any, should_step: bool) -> None:
        self.spoils = self.step == 2

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        if stage.name == "TRAIN" and self.spoils:
            predictions.register_hook(spoiled)
        return nn.functional.cross_entropy(predictions, batch[1])

    def spoiled(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, 0] = torch.inf
        return gradient

    options = {**GLOO, "skip_nonfinite_grads": True, "max_grad_norm": 0.0}
    brain = make(
        side, record, {"head": nn.Linear(FEATURES, 3)}, run_opts=options,
        compute_forward=lambda self, batch, stage: self.modules.head(batch[0]),
        compute_objectives=compute_objectives, on_fit_batch_start=on_fit_batch_start,
    )  # fmt: skip
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def no_decay_of_vectors_and_a_frozen_layer(side: Side, record: Record) -> Any:
    """Made differently in each process; unfrozen in the second epoch, with buffers."""

    def init_optimizers(self: Any) -> None:
        groups = rm_vector_weight_decay(self.modules)
        # It leaves out what is frozen; of that, nobody would zero the gradient.
        groups[1]["params"].append(modules["encoder"][0].weight)
        self.optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.5)
        self.optimizers_dict = {"opt": self.optimizer}

    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and epoch == 2:
            self.modules.encoder.requires_grad_(True)

    modules = {"normalize": Statistics(), **encoder_and_head(0.0)}
    modules["encoder"][0].weight.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(torch.distributed.get_rank())
        nn.init.normal_(modules["head"].weight)
    brain = make(
        side, record, modules, run_opts=GLOO,
        init_optimizers=init_optimizers, on_stage_start=on_stage_start,
    )  # fmt: skip
    brain.fit(
        side.EpochCounter(3), dataset(), dataset(), train_loader_kwargs={"batch_size": 4}
    )
    record.results.append(brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4}))
    return brain


def a_fit_within_a_fit(side: Side, record: Record) -> Any:
    """MetricGAN's."""

    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and epoch == 1 and not self.is_within:
            self.is_within = True
            self.fit(range(1, 2), dataset(), train_loader_kwargs={"batch_size": 5})
            self.is_within = False

    brain = make(
        side, record, encoder_and_head(0.0), run_opts=GLOO, on_stage_start=on_stage_start
    )
    brain.is_within = False
    brain.fit(range(1, 3), dataset(), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def recomputed_after_a_frozen_encoder(side: Side, record: Record) -> Any:
    """An encoder called by its method, without gradients; activation checkpointing."""
    modules = {
        "pretrained": Stack(None, None, outputs=FEATURES).requires_grad_(False),
        "model": Stack(None, False, True),
    }

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        # SpeechBrain's recipes take it out of its DistributedDataParallel.
        pretrained = getattr(self.modules.pretrained, "module", self.modules.pretrained)
        with torch.no_grad():
            features = pretrained.extract_features(batch[0])
        predictions = self.modules.model(features)
        record.results.append(predictions.argmax(-1).tolist())
        return predictions

    brain = make(side, record, modules, run_opts=GLOO, compute_forward=compute_forward)
    brain.fit(
        side.EpochCounter(2), dataset(), dataset(), train_loader_kwargs={"batch_size": 4}
    )
    return brain


# Small as they are, they are gathered one by one.
BLOCKS = {
    "recomputed_after_a_frozen_encoder": ["Layer"],
    "compiled_and_fitted_twice": ["Layer"],
    **sharded_searches.BLOCKS,
}
NEW = [
    bf16_and_accumulation, clipped, gradient_of_one_shard_not_finite,
    no_decay_of_vectors_and_a_frozen_layer, a_fit_within_a_fit,
    recomputed_after_a_frozen_encoder, *sharded_searches.SEARCHES,
]  # fmt: skip
