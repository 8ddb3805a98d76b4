"""Recipes that bring a loop of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from speechbrain.utils.checkpoints import Checkpointer
from torch import Tensor, nn
from torch.distributed import get_rank, is_initialized

from .recipes import CLASSES, FEATURES, Noisy, dataset, loader, make, two_modules
from .sides import SPEECHBRAIN, Record, Side


def prepared(
    side: Side, self: Any, train_set: Any, valid_set: Any, **train_loader_kwargs: Any
) -> Any:
    """What SpeechBrain's fit does before its epochs."""
    stage = side.Stage
    train_set = self.make_dataloader(train_set, stage=stage.TRAIN, **train_loader_kwargs)
    valid_set = self.make_dataloader(
        valid_set, stage=stage.VALID, ckpt_prefix=None, batch_size=5
    )
    self.on_fit_start()
    return train_set, valid_set


# What every Brain of a scenario gets, of its run options and its hparams.
GIVEN: dict[str, dict[str, Any]] = {}


def made(side: Side, record: Record, **namespace: Any) -> Any:
    for name, given in GIVEN.items():
        namespace[name] = {**namespace.get(name, {}), **given}
    if not is_initialized():
        return make(side, record, two_modules(0.2), **namespace)
    # Without BatchNorm, with which SpeechBrain crashes in several processes on the CPU.
    modules = {
        "encoder": nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Dropout(0.2)),
        "head": nn.Linear(8, CLASSES),
    }
    options = {"distributed_backend": "gloo", **namespace.pop("run_opts", {})}
    return make(side, record, modules, run_opts=options, **namespace)


def wrapped_once(brain: Any, record: Record) -> Any:
    """SpeechBrain wraps again in each fit: its names, and numbers of modules, differ."""
    if is_initialized():
        for name, module in brain.modules.items():
            # What is sharded is its own module.
            while hasattr(module.module, "module") and module.module is not module:
                module = module.module
            brain.modules[name] = module
        record.events.clear()
        record.tensors.clear()
    return brain


def parts_with_every_second_epoch_validated(side: Side, record: Record) -> Any:
    def fit(self: Any, epoch_counter: Any, train_set: Any, valid_set: Any, every: int) -> Any:
        train_set, valid_set = prepared(
            side, self, train_set, valid_set, batch_size=4, shuffle=True
        )
        for epoch in epoch_counter:
            self._fit_train(train_set=train_set, epoch=epoch, enable=False)
            if epoch % every == 0:
                self._fit_valid(valid_set=valid_set, epoch=epoch, enable=False)
        return "done", epoch_counter.current

    brain = made(side, record, fit=fit)
    record.results.append(brain.fit(side.EpochCounter(4), Noisy(), dataset(), every=2))
    return brain


def a_training_loop_around_speechbrains(side: Side, record: Record) -> Any:
    """CL_MASR's DER: each epoch trains on the task's data and on replayed examples."""

    def _fit_train(self: Any, train_set: Any, epoch: Any, enable: bool) -> None:
        self.replay = iter(itertools.cycle(loader(record, self, Noisy(), batch_size=2)))
        record.event(self, "before", epoch, enable)
        side.Brain._fit_train(self, train_set=train_set, epoch=epoch, enable=enable)
        record.event(self, "after")

    def compute_objectives(self: Any, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
        loss = torch.nn.functional.cross_entropy(predictions, batch[1])
        if stage == side.Stage.TRAIN:
            x, y = next(self.replay)
            again = self.modules.head(self.modules.encoder(x))
            loss = loss + 0.5 * torch.nn.functional.cross_entropy(again, y)
        return loss

    brain = made(side, record, _fit_train=_fit_train, compute_objectives=compute_objectives)
    brain.fit(
        side.EpochCounter(3), loader(record, brain, shuffle=True), loader(record, brain),
        progressbar=False,
    )  # fmt: skip
    return brain


def attacked(self: Any, batch: Any, stage: Any) -> Any:
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        loss = self.compute_objectives(
            self.compute_forward([x, batch[1]], stage), batch, stage
        )
        (gradient,) = torch.autograd.grad(loss, x)
    return [batch[0] + 0.1 * gradient.sign(), batch[1]]


def validate_attacked(self: Any, stages: Any, valid_set: Any, epoch: Any) -> None:
    self.on_stage_start(stages.VALID, epoch)
    self.modules.eval()
    average = 0.0
    for batch in valid_set:
        self.step += 1
        loss = self.evaluate_batch(attacked(self, batch, stages.VALID), stages.VALID)
        average = self.update_average(loss, average)
    self.step = 0
    self.on_stage_end(stages.VALID, average, epoch)


def adversarial(side: Side, record: Record) -> Any:
    """robust_speech: a fit of parts, both written anew, with an attack in each."""
    stages = side.Stage

    def _fit_train(self: Any, train_set: Any, epoch: Any, enable: bool) -> None:
        self.on_stage_start(stages.TRAIN, epoch)
        self.modules.train()
        self.nonfinite_count = 0
        for batch in train_set:
            if self._optimizer_step_limit_exceeded:
                break
            self.step += 1
            loss = self.fit_batch(attacked(self, batch, stages.TRAIN))
            self.avg_train_loss = self.update_average(loss, self.avg_train_loss)
        self.on_stage_end(stages.TRAIN, self.avg_train_loss, epoch)
        self.avg_train_loss, self.step = 0.0, 0

    def _fit_valid(self: Any, valid_set: Any, epoch: Any, enable: bool) -> None:
        validate_attacked(self, stages, valid_set, epoch)

    def fit(self: Any, epoch_counter: Any, train_set: Any, valid_set: Any) -> None:
        train_set, valid_set = prepared(
            side, self, train_set, valid_set, batch_size=4, shuffle=True
        )
        for epoch in epoch_counter:
            self._fit_train(train_set=train_set, epoch=epoch, enable=False)
            self._fit_valid(valid_set, epoch, enable=False)

    brain = made(side, record, fit=fit, _fit_train=_fit_train, _fit_valid=_fit_valid)
    brain.fit(side.EpochCounter(3), dataset(), dataset())
    return brain


def attacked_in_fit_batch(side: Side, record: Record) -> Any:
    """The same by a fit_batch, which SpeechBrain's _fit_train calls."""

    def fit_batch(self: Any, batch: Any) -> Tensor:
        for attacked_batch in (batch, attacked(self, batch, side.Stage.TRAIN)):
            outputs = self.compute_forward(attacked_batch, side.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_step += 1
        return loss.detach().cpu()

    def fit(self: Any, epoch_counter: Any, train_set: Any, valid_set: Any) -> None:
        train_set, valid_set = prepared(side, self, train_set, valid_set, batch_size=4)
        for epoch in epoch_counter:
            self._fit_train(train_set=train_set, epoch=epoch, enable=False)
            validate_attacked(self, side.Stage, valid_set, epoch)

    brain = made(side, record, fit=fit, fit_batch=fit_batch)
    brain.fit(side.EpochCounter(3), dataset(), dataset())
    return brain


def several_sets_in_an_epoch(side: Side, record: Record) -> Any:
    """Anything that can be iterated: loaders, a list, a tuple, a generator, a zip."""

    def fit(self: Any, epochs: Any) -> None:
        self.on_fit_start()
        shuffled, plain = loader(record, self, shuffle=True), loader(record, self, Noisy())
        batches = [(torch.randn(3, FEATURES), torch.tensor([0, 1, 2])) for _ in range(2)]
        for epoch in epochs:
            self._fit_valid(tuple(batches), epoch, False)
            self._fit_train(shuffled, epoch, False)
            self._fit_train(batches, epoch, enable=False)
            self._fit_valid(plain, epoch=epoch, enable=False)
            self._fit_valid(None, epoch, False)
            self._fit_train((batch for batch in batches), epoch, False)
            pairs = zip(plain, shuffled, strict=False)
            self._fit_valid((one for one, _ in pairs), epoch, False)
            self._fit_train([], epoch, False)

    brain = made(side, record, fit=fit)
    brain.fit(iter(range(3)))
    return brain


def validations_in_hooks(side: Side, record: Record) -> Any:
    """Every second batch, at the end of TRAIN, and of another set at the end of VALID."""

    def on_fit_batch_end(self: Any, batch: Any, outputs: Any, loss: Any, should: bool) -> None:
        if self.step % 2 == 0:
            step, self.step = self.step, 0
            self._fit_valid(valid_set=self.valid, epoch=step, enable=False)
            self.modules.train()
            self.step = step

    def on_stage_end(self: Any, stage: Any, loss: Any, epoch: Any) -> None:
        record.event(self, "stage_end", stage.name, float(loss), epoch)
        if stage == side.Stage.TRAIN:
            self._fit_valid(self.other, epoch, enable=False)
        if stage == side.Stage.VALID and epoch and not getattr(self, "is_within", False):
            self.is_within = True
            self._fit_valid(self.other, 7, enable=False)
            self.is_within = False

    brain = made(side, record, on_fit_batch_end=on_fit_batch_end, on_stage_end=on_stage_end)
    brain.valid, brain.other = loader(record, brain), loader(record, brain, batch_size=7)
    brain.fit(range(1, 3), loader(record, brain, shuffle=True), brain.valid, progressbar=False)
    return brain


def parts_before_speechbrains_fit(side: Side, record: Record) -> Any:
    def fit(self: Any, epoch_counter: Any, train_set: Any, *args: Any, **kwargs: Any) -> None:
        self.on_fit_start()
        self._fit_train(loader(record, self, batch_size=5), 0, False)
        side.Brain.fit(self, epoch_counter, train_set, *args, **kwargs)
        self._fit_valid(loader(record, self), "last", False)

    brain = made(side, record, fit=fit, run_opts={"optimizer_step_limit": 11})
    kwargs = {"train_loader_kwargs": {"batch_size": 4, "shuffle": True}}
    brain.fit(side.EpochCounter(3), Noisy(), loader(record, brain), **kwargs)
    return wrapped_once(brain, record)


def brains_in_turns(side: Side, record: Record) -> Any:
    """Two Brains without a fit around: the loops as parts of a script."""
    one, other = made(side, record), made(side, record)
    for brain in (one, other):
        brain.on_fit_start()
    train, valid = loader(record, one, Noisy(), shuffle=True), loader(record, one)
    for epoch in range(1, 4):
        for brain in (one, other):
            brain._fit_train(train, epoch, False)
            brain._fit_valid(valid, epoch, False)
    record.tensors.append(dict(other.modules.state_dict()))
    return one


def a_brain_within_the_fit_of_another(side: Side, record: Record) -> Any:
    teacher = made(side, record)

    def fit(self: Any, epoch_counter: Any, train_set: Any) -> None:
        teacher.on_fit_start()
        self.on_fit_start()
        for epoch in epoch_counter:
            teacher._fit_train(train_set, epoch, False)
            self._fit_train(train_set, epoch, False)
            teacher._fit_valid(train_set, epoch, False)
            self._fit_valid(train_set, epoch, False)

    brain = made(side, record, fit=fit)
    brain.fit(range(1, 4), loader(record, brain, shuffle=True))
    record.tensors.append(dict(teacher.modules.state_dict()))
    return brain


def a_client_of_a_federation(side: Side, record: Record) -> Any:
    """fit is called again and again, on another set each time."""
    brain = made(side, record)
    updates = brain.optimizer_step_limit
    # With and without a validation, shuffled or not, one epoch or two: each pair of them.
    for client in range(6):
        if updates is not None:
            # A Trainer's max_steps is of each fit.
            brain.optimizer_step_limit = brain.optimizer_step + updates
        train = loader(
            record, brain, dataset(4 + 2 * client), batch_size=2, shuffle=client % 2 == 0
        )
        valid = loader(record, brain, dataset(5)) if client % 3 else None
        brain.fit(range(client, client + 1 + client % 2), train, valid)
    return wrapped_once(brain, record)


def a_validation_that_counts_on(side: Side, record: Record) -> Any:
    """SpeechBrain's _fit_valid counts on from the step of the training."""

    def on_fit_batch_end(self: Any, *_: Any) -> None:
        if self.step == 3:
            self._fit_valid(self.valid, 1, False)
            self.step = 3

    brain = made(side, record, on_fit_batch_end=on_fit_batch_end)
    brain.valid = loader(record, brain)
    brain.fit(range(1, 3), loader(record, brain), brain.valid)
    return brain


def a_whole_loop(side: Side, record: Record) -> Any:
    stages = side.Stage

    def fit(self: Any, epoch_counter: Any, train_set: Any) -> bool:
        self.on_fit_start()
        for epoch in epoch_counter:
            self.on_stage_start(stages.TRAIN, epoch)
            self.modules.train()
            for batch in train_set:
                if self._optimizer_step_limit_exceeded:
                    break
                self.step += 1
                loss = self.fit_batch(batch)
                self.avg_train_loss = self.update_average(loss, self.avg_train_loss)
                if self.profiler is not None:
                    self.profiler.step()
            self.on_stage_end(stages.TRAIN, self.avg_train_loss, epoch)
            self.avg_train_loss, self.step = 0.0, 0
        # SpeechBrain 1.1 has them.
        return getattr(self, "raw_modules", self.modules) is self.modules

    brain = made(side, record, fit=fit, run_opts={"optimizer_step_limit": 12})
    record.results.append(brain.fit(range(1, 5), loader(record, brain, shuffle=True)))
    return brain


def plain(function: Any) -> Any:
    """A decorator without functools.wraps."""
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def parts_of_any_form(side: Side, record: Record) -> Any:
    """By keywords alone, decorated, with results, and without nonfinite_count."""

    def _fit_train(self: Any, **kwargs: Any) -> str:
        self.on_stage_start(side.Stage.TRAIN, kwargs["epoch"])
        self.modules.train()
        for batch in kwargs["train_set"]:
            self.step += 1
            outputs = self.compute_forward(batch, side.Stage.TRAIN)
            self.compute_objectives(outputs, batch, side.Stage.TRAIN).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.on_stage_end(side.Stage.TRAIN, 1.0, kwargs["epoch"])
        self.step = 0
        return "trained"

    @plain
    def _fit_valid(self: Any, *args: Any, epoch: Any = "none", **kwargs: Any) -> str:
        side.Brain._fit_valid(self, *args, epoch=epoch, **kwargs)
        return "validated"

    def fit(self: Any, epochs: Any, data: Any) -> None:
        self.on_fit_start()
        for epoch in epochs:
            parts = self._fit_train(train_set=data, epoch=epoch, enable=False)
            self.parts = [parts, self._fit_valid(data, enable=False), list(epochs)]

    brain = made(side, record, fit=fit, _fit_train=_fit_train, _fit_valid=_fit_valid)
    brain.fit(range(2), loader(record, brain, shuffle=True))
    record.results.append(brain.parts)
    return brain


def called_by_a_function(side: Side, record: Record) -> Any:
    """A limit of the Brain's that the recipe has written, and parts that a function calls."""

    def limit(self: Any) -> bool:
        return self.optimizer_step >= 8

    def fit(self: Any, epochs: Any, data: Any) -> None:
        all_parts(self, epochs, data)

    brain = made(side, record, fit=fit, _optimizer_step_limit_exceeded=property(limit))
    brain.fit(range(3), loader(record, brain, shuffle=True))
    brain.raw_modules = None
    return brain


def all_parts(brain: Any, epochs: Any, data: Any) -> None:
    brain.on_fit_start()
    for epoch in epochs:
        brain._fit_train(data, epoch, False)
        brain._fit_valid(data, epoch, False)


def a_checkpoint_of_a_validation_in_a_batch(side: Side, record: Record) -> Any:
    def on_fit_batch_end(self: Any, *_: Any) -> None:
        if self.step % 2 == 0:
            step = self.step
            self._fit_valid(self.valid, 1, False)
            self.step = step
            self.modules.train()

    def on_stage_end(self: Any, stage: Any, *_: Any) -> None:
        if stage == side.Stage.VALID:
            self.checkpointer.save_and_keep_only(end_of_epoch=False)

    modules = two_modules(0.2)
    with TemporaryDirectory() as folder:
        brain = make(
            side, record, modules, checkpointer=Checkpointer(folder, modules),
            on_fit_batch_end=on_fit_batch_end, on_stage_end=on_stage_end,
        )  # fmt: skip
        brain.valid = loader(record, brain)
        brain.fit(range(1, 3), loader(record, brain, shuffle=True))
    return brain


SCENARIOS = [
    parts_with_every_second_epoch_validated, a_training_loop_around_speechbrains, adversarial,
    attacked_in_fit_batch,
    several_sets_in_an_epoch, validations_in_hooks, parts_before_speechbrains_fit,
    brains_in_turns, a_brain_within_the_fit_of_another, a_client_of_a_federation,
    a_validation_that_counts_on, a_whole_loop, parts_of_any_form, called_by_a_function,
]  # fmt: skip


# ------------------------------------------------- ended by a Trainer, or as SpeechBrain ends


def by_max_steps(side: Side) -> tuple[Side, dict[str, Any], dict[str, Any]]:
    """SpeechBrain's limit, and a Trainer's."""
    return side, {"optimizer_step_limit": 7}, {"max_steps": 7}


def by_early_stopping(side: Side) -> tuple[Side, dict[str, Any], dict[str, Any]]:
    """Two epochs, and a Trainer that ends after the second."""
    two = replace(side, EpochCounter=lambda _: side.EpochCounter(2))
    stopping = EarlyStopping("valid_loss", min_delta=100.0, patience=1)
    return two, {}, {"callbacks": [stopping]}


def ended(scenario: Any, by: Any) -> Any:
    """A scenario that ends early; what it has learned then is to be compared."""

    def early(side: Side, record: Record) -> Any:
        speechbrains, options, arguments = by(side)
        with TemporaryDirectory() as folder:
            logged = {**arguments, "logger": CSVLogger(folder, "", "")}
            own = side is SPEECHBRAIN
            given = {"run_opts": options} if own else {"hparams": {"trainer": logged}}
            with mock.patch.dict(GIVEN, given):
                brain = scenario(speechbrains if own else side, record)
            rows = Path(folder, "metrics.csv")
            on_main = not is_initialized() or get_rank() == 0
            assert own or rows.exists() == on_main
            assert own or not on_main or "train_loss" in rows.read_text()
        last = record.stage_losses[: 4 if by is by_max_steps else None]
        record.events.clear()
        record.tensors.clear()
        record.stage_losses[:] = last
        record.results[:] = [brain.optimizer_step]
        return brain

    early.__name__ = f"{scenario.__name__}_ended_{by.__name__}"
    return early


# Public recipes' own, in several processes on both Brains.
PATTERNS = [a_training_loop_around_speechbrains, attacked_in_fit_batch, adversarial]
IN_TWO_PROCESSES = [
    *PATTERNS, parts_with_every_second_epoch_validated, several_sets_in_an_epoch,
    validations_in_hooks, a_client_of_a_federation,
]  # fmt: skip
# In several processes SpeechBrain's Checkpointer waits where one rank alone saves.
IN_ONE_PROCESS = [a_checkpoint_of_a_validation_in_a_batch]
ENDED = [
    ended(scenario, by)
    for scenario in (
        a_training_loop_around_speechbrains, attacked_in_fit_batch, adversarial,
        a_client_of_a_federation,
    )
    for by in (by_max_steps, by_early_stopping)
    if scenario is not a_client_of_a_federation or by is by_max_steps
]  # fmt: skip
