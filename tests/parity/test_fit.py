"""``fit`` and ``evaluate`` of both sides, from the same seed, compared bit for bit."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from typing import Any

import pytest
import torch
from speechbrain.dataio.dataloader import LoopedLoader
from torch import nn

from .recipes import (
    ChangingBatches,
    CountsSaves,
    Noisy,
    Stream,
    dataset,
    loader,
    make,
    two_modules,
)
from .sides import (
    OURS,
    PATCHED,
    SPEECHBRAIN,
    Record,
    Side,
    assert_equal,
    assert_moved,
    assert_same_run,
    run,
)

SHUFFLED = {"batch_size": 4, "shuffle": True}


def one_module(side: Side, record: Record) -> Any:
    brain = make(side, record)
    brain.fit(side.EpochCounter(3), loader(record, brain), loader(record, brain))
    return brain


def two_modules_sgd(side: Side, record: Record) -> Any:
    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    brain = make(side, record, two_modules(), opt_class=sgd)
    brain.fit(range(1, 4), loader(record, brain), loader(record, brain))
    return brain


def dropout_shuffled(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(dropout=0.3))
    brain.fit(
        side.EpochCounter(3), dataset(), dataset(),
        train_loader_kwargs=SHUFFLED, valid_loader_kwargs={"batch_size": 5},
    )  # fmt: skip
    return brain


def shuffled_by_the_global_rng(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(dropout=0.3))
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(3), train, loader(record, brain, shuffle=False))
    return brain


def augmented(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(dropout=0.3))
    brain.fit(side.EpochCounter(3), loader(record, brain, Noisy()), loader(record, brain))
    return brain


def two_workers(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(dropout=0.3))
    train = loader(record, brain, Noisy(), num_workers=2, shuffle=True)
    brain.fit(side.EpochCounter(2), train, loader(record, brain, num_workers=2))
    return brain


def two_workers_made_by_the_brain(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(dropout=0.3))
    kwargs = {**SHUFFLED, "num_workers": 2}
    brain.fit(side.EpochCounter(2), Noisy(), train_loader_kwargs=kwargs)
    return brain


def stage_start_draws(side: Side, record: Record) -> Any:
    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        record.results.append(torch.rand(3).tolist())

    brain = make(side, record, two_modules(dropout=0.3), on_stage_start=on_stage_start)
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(3), train, loader(record, brain))
    return brain


def bf16(side: Side, record: Record) -> Any:
    options = {"precision": "bf16", "eval_precision": "bf16"}

    def compute_forward(self: Any, batch: Any, stage: Any) -> Any:
        record.results.append((torch.is_autocast_enabled("cpu"), stage.name))
        return self.modules.head(self.modules.encoder(batch[0]))

    brain = make(
        side, record, two_modules(), run_opts=options, compute_forward=compute_forward
    )
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    assert (True, "TRAIN") in record.results
    return brain


def bf16_training_only(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(), hparams={"precision": "bf16"})
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    return brain


def accumulation(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2), run_opts={"grad_accumulation_factor": 3})
    train = loader(record, brain, batch_size=2, shuffle=True)
    assert len(train) == 10
    brain.fit(side.EpochCounter(3), train, loader(record, brain))
    record.results.append(brain.optimizer_step)
    return brain


def _init_two(self: Any) -> None:
    self.encoder_optimizer = torch.optim.Adam(self.modules.encoder.parameters(), 0.01)
    self.head_optimizer = torch.optim.SGD(self.modules.head.parameters(), 0.1)
    self.optimizers_dict = {"encoder": self.encoder_optimizer, "head": self.head_optimizer}


def two_optimizers(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2), init_optimizers=_init_two)
    brain.fit(side.EpochCounter(3), loader(record, brain), loader(record, brain))
    return brain


def _freeze_alternating(self: Any, optimizers: Any) -> Any:
    return {"head": optimizers["head"]} if self.step % 2 else optimizers


def frozen_alternating(side: Side, record: Record) -> Any:
    brain = make(
        side, record, two_modules(0.2),
        init_optimizers=_init_two, freeze_optimizers=_freeze_alternating,
        run_opts={"max_grad_norm": 0.1},
    )  # fmt: skip
    brain.fit(side.EpochCounter(3), loader(record, brain), loader(record, brain))
    return brain


def optimizer_without_dict(side: Side, record: Record) -> Any:
    def init_optimizers(self: Any) -> None:
        self.optimizer = self.opt_class(self.modules.parameters())

    brain = make(side, record, init_optimizers=init_optimizers)
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def optimizer_replaced(side: Side, record: Record) -> Any:
    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and epoch == 2:
            self.optimizer = torch.optim.SGD(self.modules.parameters(), lr=0.05)
            self.optimizers_dict = {"sgd": self.optimizer}

    brain = make(side, record, on_stage_start=on_stage_start)
    brain.fit(side.EpochCounter(3), loader(record, brain))
    return brain


def learning_rate_annealed(side: Side, record: Record) -> Any:
    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def on_fit_batch_end(
        self: Any, batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.99

    brain = make(side, record, on_stage_end=on_stage_end, on_fit_batch_end=on_fit_batch_end)
    brain.fit(side.EpochCounter(3), loader(record, brain), loader(record, brain))
    return brain


def clipped(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts={"max_grad_norm": 0.01})
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def nonfinite_gradients_dropped(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = nn.functional.cross_entropy(predictions, batch[1])
        # A finite loss whose gradient is not: the derivative of sqrt at 0.
        return loss + (0 * self.modules.encoder[0].weight[0, 0]).sqrt()

    brain = make(
        side, record, two_modules(),
        run_opts={"skip_nonfinite_grads": True}, compute_objectives=compute_objectives,
    )  # fmt: skip
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def no_vector_weight_decay(side: Side, record: Record) -> Any:
    def adamw(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5)

    # SpeechBrain clips the first parameter group only: see the README's table.
    options = {"remove_vector_weight_decay": True, "max_grad_norm": 1e9}
    brain = make(side, record, two_modules(), opt_class=adamw, run_opts=options)
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def no_valid_set(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    brain.fit(side.EpochCounter(3), loader(record, brain))
    return brain


def evaluate_after_fit(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    record.results.append(brain.evaluate(loader(record, brain), min_key="loss"))
    record.results.append(brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 3}))
    return brain


def evaluate_between_epochs(side: Side, record: Record) -> Any:
    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            record.results.append(self.evaluate(loader(record, self)))

    brain = make(side, record, two_modules(0.2), on_stage_end=on_stage_end)
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    return brain


def fit_twice(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    for epochs in (2, 1):
        brain.fit(side.EpochCounter(epochs), loader(record, brain), loader(record, brain))
    return brain


def finished_counter_again(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    counter = side.EpochCounter(2)
    for _ in range(2):
        brain.fit(counter, loader(record, brain), loader(record, brain))
        record.results.append(counter.current)
    return brain


def counter_with_stopper(side: Side, record: Record) -> Any:
    counter = side.EpochCounterWithStopper(10, 2, 1, "min")

    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            counter.update_metric([1.0, 0.5, 0.6, 0.7, 0.1][epoch - 1])

    brain = make(side, record, on_stage_end=on_stage_end)
    brain.fit(counter, loader(record, brain), loader(record, brain))
    record.results.append((counter.current, counter.best_limit, counter.should_stop))
    return brain


def fit_inside_fit(side: Side, record: Record) -> Any:
    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and not self.inner:
            self.inner = True
            for _ in range(2):
                inner = loader(record, self, batch_size=7, shuffle=True)
                self.fit(range(10 * epoch, 10 * epoch + 1), inner, loader(record, self))
            self.inner = False

    brain = make(side, record, two_modules(0.2), on_stage_start=on_stage_start, inner=False)
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(2), train, loader(record, brain))
    return brain


def counted_by_range(side: Side, record: Record) -> Any:
    brain = make(side, record)
    brain.fit(range(2), loader(record, brain), loader(record, brain))
    return brain


def counted_by_a_generator(side: Side, record: Record) -> Any:
    brain = make(side, record)

    def epochs() -> Any:
        for name in ("first", "second"):
            record.event(brain, "epoch drawn")
            yield name
        record.event(brain, "no epoch left")

    brain.fit(epochs(), loader(record, brain), loader(record, brain))
    return brain


def no_epoch_at_all(side: Side, record: Record) -> Any:
    brain = make(side, record)
    brain.fit(range(0), loader(record, brain), loader(record, brain))
    brain.fit(range(1), loader(record, brain))
    return brain


def stream_without_length(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    train, valid = loader(record, brain, Stream()), loader(record, brain, Stream(8))
    brain.fit(side.EpochCounter(3), train, valid)
    return brain


def stream_given_as_dataset(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    kwargs = {"batch_size": 3}
    brain.fit(
        side.EpochCounter(2), Stream(), Stream(),
        train_loader_kwargs=kwargs, valid_loader_kwargs=kwargs,
    )  # fmt: skip
    return brain


def records_given_as_dataset(side: Side, record: Record) -> Any:
    """As SpeechBrain's MetricGAN recipe, which makes the loader of a dict by itself."""

    def make_dataloader(self: Any, data: Any, stage: Any, **kwargs: Any) -> Any:
        if isinstance(data, dict):
            data = [dataset()[each["index"]] for each in data.values()]
        return side.Brain.make_dataloader(self, data, stage, **kwargs)

    brain = make(side, record, make_dataloader=make_dataloader)
    records = {f"utt{n}": {"index": n, "score": 0.5} for n in range(9)}
    brain.fit(range(2), records, train_loader_kwargs={"batch_size": 2})
    return brain


def changing_length(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    train = loader(record, brain, batch_sampler=ChangingBatches(3, 6, 2, 0, 4))
    valid = loader(record, brain, batch_sampler=ChangingBatches(2, 4, 1, 0, 3))
    brain.fit(side.EpochCounter(5), train, valid)
    return brain


def wrong_length(side: Side, record: Record) -> Any:
    class Lying(ChangingBatches):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            length = self.lengths[self.passes]
            self.passes += 1
            yield from ([i, i + 1] for i in range(length))

    brain = make(side, record, two_modules(0.2))
    train = loader(record, brain, batch_sampler=Lying(2, 5, 3))
    valid = loader(record, brain, batch_sampler=Lying(1, 4, 3))
    brain.fit(side.EpochCounter(3), train, valid)
    return brain


def empty_sets(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    train = loader(record, brain, batch_sampler=ChangingBatches(0, 3))
    valid = loader(record, brain, batch_sampler=ChangingBatches(0, 0))
    brain.fit(side.EpochCounter(2), train, valid)
    record.results.append(
        brain.evaluate(loader(record, brain, batch_sampler=ChangingBatches(0)))
    )
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def looped_loader(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2))
    train = LoopedLoader(loader(record, brain, shuffle=True), epoch_length=3, batchsize_fn=len)
    train.batchsize_fn = len
    brain.fit(side.EpochCounter(3), train, loader(record, brain))
    return brain


def debug_mode(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2), run_opts={"debug": True})
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(10), train, loader(record, brain))
    record.results.append(brain.evaluate(loader(record, brain)))
    return brain


def debug_mode_in_numbers(side: Side, record: Record) -> Any:
    options = {"debug": True, "debug_batches": 4, "debug_epochs": 1}
    brain = make(side, record, two_modules(0.2), run_opts=options)
    brain.fit(side.EpochCounter(10), loader(record, brain), loader(record, brain))
    return brain


def update_limit(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2), run_opts={"optimizer_step_limit": 7})
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(5), train, loader(record, brain))
    # The limit is reached already: SpeechBrain still runs one epoch's hooks.
    brain.fit(side.EpochCounter(5), train, loader(record, brain))
    record.results.append(brain.optimizer_step)
    return brain


def only_tested(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts={"test_only": True})
    brain.fit(side.EpochCounter(2), loader(record, brain))
    record.results.append(brain.evaluate(loader(record, brain)))
    brain.test_only = False
    brain.fit(side.EpochCounter(2), loader(record, brain))
    return brain


def interrupted(side: Side, record: Record) -> Any:
    def on_fit_batch_end(
        self: Any, batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> None:
        if self.optimizer_step == 7 and not self.interrupted:
            self.interrupted = True
            os.kill(os.getpid(), signal.SIGINT)

    brain = make(
        side, record, two_modules(0.2), on_fit_batch_end=on_fit_batch_end, interrupted=False
    )
    with pytest.raises(KeyboardInterrupt):
        brain.fit(side.EpochCounter(5), loader(record, brain), loader(record, brain))
    record.results.append((brain.step, brain.avg_train_loss, brain.optimizer_step))
    # And on as after any other Ctrl-C.
    brain.fit(side.EpochCounter(1), loader(record, brain), loader(record, brain))
    return brain


def an_exception(side: Side, record: Record) -> Any:
    def compute_forward(self: Any, batch: Any, stage: Any) -> Any:
        if self.optimizer_step == 6 and stage.name == "VALID":
            raise RuntimeError("out of memory")
        return self.modules.model(batch[0])

    brain = make(side, record, compute_forward=compute_forward)
    train, valid = loader(record, brain, num_workers=2), loader(record, brain)
    with pytest.raises(RuntimeError, match="out of memory"):
        brain.fit(side.EpochCounter(5), loader(record, brain, batch_size=8), valid)
    record.results.append((brain.step, brain.avg_train_loss))
    brain.step = 0
    brain.fit(side.EpochCounter(1), train)
    return brain


def with_a_bar(side: Side, record: Record) -> Any:
    brain = make(side, record, two_modules(0.2), run_opts={"tqdm_colored_bar": True})
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(2), train, loader(record, brain), progressbar=True)
    return brain


def fit_batch_overridden(side: Side, record: Record) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        loss = self.compute_objectives(
            self.compute_forward(batch, side.Stage.TRAIN), batch, side.Stage.TRAIN
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_step += 1
        return loss.detach()

    brain = make(side, record, two_modules(0.2), fit_batch=fit_batch)
    brain.fit(side.EpochCounter(2), loader(record, brain, shuffle=True), loader(record, brain))
    return brain


def fit_batch_calls_super(side: Side, record: Record) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        record.event(self, "fit_batch")
        return side.Brain.fit_batch(self, batch)

    options = {"grad_accumulation_factor": 2}
    brain = make(side, record, two_modules(0.2), fit_batch=fit_batch, run_opts=options)
    brain.fit(side.EpochCounter(2), loader(record, brain, shuffle=True), loader(record, brain))
    return brain


def optimizers_step_overridden(side: Side, record: Record) -> Any:
    def optimizers_step(self: Any) -> None:
        record.event(self, "optimizers_step")
        for parameter in self.modules.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        side.Brain.optimizers_step(self)

    options = {"grad_accumulation_factor": 2, "max_grad_norm": 0.1}
    brain = make(
        side, record, two_modules(0.2),
        optimizers_step=optimizers_step, init_optimizers=_init_two, run_opts=options,
    )  # fmt: skip
    brain.fit(side.EpochCounter(2), loader(record, brain, shuffle=True), loader(record, brain))
    return brain


def scaler_and_contexts_used_by_hand(side: Side, record: Record) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        should_step = self.step % self.grad_accumulation_factor == 0
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, side.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        if should_step:
            self.scaler.unscale_(self.optimizer)
            self.check_gradients()
            nn.utils.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.zero_grad(set_to_none=True)
            self.optimizer_step += 1
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return loss.detach().cpu()

    options = {"grad_accumulation_factor": 2, "precision": "bf16"}
    brain = make(side, record, two_modules(0.2), fit_batch=fit_batch, run_opts=options)
    brain.fit(side.EpochCounter(2), loader(record, brain, shuffle=True), loader(record, brain))
    return brain


def generator_and_discriminator(side: Side, record: Record) -> Any:
    """Three updates a batch with raw steps, as SpeechBrain's SEGAN recipe."""

    def init_optimizers(self: Any) -> None:
        self.optimizer_d = torch.optim.RMSprop(self.modules.head.parameters(), 0.01)
        self.optimizer_g = torch.optim.Adam(self.modules.encoder.parameters(), 0.01)
        self.optimizers_dict = {"d": self.optimizer_d, "g": self.optimizer_g}

    def fit_batch(self: Any, batch: Any) -> Any:
        noise = torch.randn_like(batch[0])
        losses = []
        for optimizer, inputs, sign in [
            (self.optimizer_d, batch[0], 1.0),
            (self.optimizer_d, noise, -1.0),
            (self.optimizer_g, noise, 1.0),
        ]:
            loss = sign * self.modules.head(self.modules.encoder(inputs)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        self.optimizer_step += 1
        return losses[0] + losses[2]

    brain = make(
        side, record, two_modules(0.2), init_optimizers=init_optimizers, fit_batch=fit_batch
    )
    brain.fit(side.EpochCounter(3), loader(record, brain, shuffle=True), loader(record, brain))
    return brain


def validated_every_other_epoch(side: Side, record: Record) -> Any:
    """As two recipes of SpeechBrain do (LibriTTS/focalcodec)."""

    def _fit_valid(self: Any, valid_set: Any, epoch: Any, enable: bool) -> None:
        record.event(self, "_fit_valid", epoch, enable, len(valid_set))
        if epoch % 2 == 0:
            super(type(self), self)._fit_valid(valid_set, epoch, enable)

    brain = make(side, record, two_modules(0.2), _fit_valid=_fit_valid)
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(4), train, loader(record, brain))
    return brain


def validation_of_its_own(side: Side, record: Record) -> Any:
    def _fit_valid(self: Any, valid_set: Any, epoch: Any, enable: bool) -> None:
        record.event(self, "_fit_valid", epoch)
        self.modules.eval()
        with torch.no_grad():
            losses = [self.evaluate_batch(batch, side.Stage.VALID) for batch in valid_set]
        record.results.append(float(sum(losses)))

    brain = make(side, record, two_modules(0.2), _fit_valid=_fit_valid)
    train = loader(record, brain, shuffle=True)
    brain.fit(side.EpochCounter(3), train, loader(record, brain))
    return brain


def interval_saves_of_its_own(side: Side, record: Record) -> Any:
    def _should_save_intra_epoch_ckpt(self: Any, last_ckpt_time: float, steps: int) -> bool:
        return self.step in (2, 3)

    def _save_intra_epoch_ckpt(self: Any) -> None:
        record.event(self, "_save_intra_epoch_ckpt")
        super(type(self), self)._save_intra_epoch_ckpt()

    brain = make(
        side, record, checkpointer=CountsSaves(record), hparams={"ckpt_interval_minutes": 0},
        _should_save_intra_epoch_ckpt=_should_save_intra_epoch_ckpt,
        _save_intra_epoch_ckpt=_save_intra_epoch_ckpt,
    )  # fmt: skip
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    assert len(record.results) == 4
    return brain


def steps_between_saves(side: Side, record: Record) -> Any:
    options = {"ckpt_interval_steps": 2}
    brain = make(side, record, checkpointer=CountsSaves(record), run_opts=options)
    brain.fit(side.EpochCounter(2), loader(record, brain))
    assert len(record.results) == 4
    return brain


def stages_told_apart_by_identity(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Any:
        weight = 2 if stage is side.Stage.TRAIN else 1
        return weight * nn.functional.cross_entropy(predictions, batch[1])

    brain = make(side, record, compute_objectives=compute_objectives)
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    brain.evaluate(loader(record, brain))
    return brain


def optimizer_classes_in_a_list(side: Side, record: Record) -> Any:
    """As HiFi-GAN: what ``opt_class`` is matters to its own ``init_optimizers`` alone."""

    def init_optimizers(self: Any) -> None:
        first, second = self.opt_class
        self.first = first(self.modules.encoder.parameters())
        self.second = second(self.modules.head.parameters())
        self.optimizers_dict = {"first": self.first, "second": self.second}

    classes = [torch.optim.Adam, torch.optim.Adagrad]
    brain = make(side, record, two_modules(0.2), classes, init_optimizers=init_optimizers)
    brain.fit(side.EpochCounter(2), loader(record, brain, shuffle=True))
    return brain


def no_hparams(side: Side, record: Record) -> Any:
    brain = make(side, record, hparams=None)
    brain.fit(side.EpochCounter(1), loader(record, brain))
    brain.fit(side.EpochCounter(1), loader(record, brain))
    return brain


SCENARIOS = [
    one_module, two_modules_sgd, dropout_shuffled, shuffled_by_the_global_rng, augmented,
    two_workers, two_workers_made_by_the_brain, stage_start_draws, bf16, bf16_training_only,
    accumulation, two_optimizers, frozen_alternating, optimizer_without_dict,
    optimizer_replaced, learning_rate_annealed, clipped, nonfinite_gradients_dropped,
    no_vector_weight_decay, no_valid_set, evaluate_after_fit, evaluate_between_epochs,
    fit_twice, finished_counter_again, counter_with_stopper, fit_inside_fit, counted_by_range,
    counted_by_a_generator, no_epoch_at_all, stream_without_length, stream_given_as_dataset,
    records_given_as_dataset,
    changing_length, wrong_length, empty_sets, looped_loader, debug_mode,
    debug_mode_in_numbers, update_limit, only_tested, interrupted, an_exception, with_a_bar,
    fit_batch_overridden, fit_batch_calls_super, optimizers_step_overridden,
    scaler_and_contexts_used_by_hand, generator_and_discriminator, no_hparams,
    validated_every_other_epoch, validation_of_its_own, interval_saves_of_its_own,
    steps_between_saves, stages_told_apart_by_identity, optimizer_classes_in_a_list,
]  # fmt: skip


@functools.lru_cache(maxsize=1)
def by_speechbrain(scenario: Any) -> tuple[Record, Any]:
    """What both sides are compared with; their tests follow one another."""
    return run(SPEECHBRAIN, scenario)


@pytest.mark.parametrize("side", [OURS, PATCHED], ids=lambda side: side.name)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_same_bits_in_same_order(scenario: Any, side: Side) -> None:
    assert_same_run(scenario, side, by_speechbrain(scenario))


def test_every_pair_of_scenarios_is_a_different_run() -> None:
    """A scenario that records nothing of its own would compare nothing."""
    records = [
        run(OURS, scenario)[0].events for scenario in (one_module, no_valid_set, clipped)
    ]
    for one, other in itertools.combinations(records, 2):
        assert one != other


def forced_manual(side: Side, record: Record) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        return side.Brain.fit_batch(self, batch)

    options = {"grad_accumulation_factor": 3}
    brain = make(
        side, record, two_modules(0.2), init_optimizers=_init_two,
        freeze_optimizers=_freeze_alternating, fit_batch=fit_batch, run_opts=options,
    )  # fmt: skip
    train = loader(record, brain, batch_size=2, shuffle=True)
    brain.fit(side.EpochCounter(2), train, loader(record, brain))
    return brain


def left_automatic(side: Side, record: Record) -> Any:
    options = {"grad_accumulation_factor": 3}
    brain = make(
        side, record, two_modules(0.2), init_optimizers=_init_two,
        freeze_optimizers=_freeze_alternating, run_opts=options,
    )  # fmt: skip
    train = loader(record, brain, batch_size=2, shuffle=True)
    brain.fit(side.EpochCounter(2), train, loader(record, brain))
    return brain


def test_a_brain_forced_to_step_by_hand_gives_what_lightnings_automatic_way_gives() -> None:
    manual, _ = run(OURS, forced_manual)
    automatic, _ = run(OURS, left_automatic)
    assert_equal(manual, automatic)
    assert_moved(automatic)
