"""What both sides do in several processes; each process leaves its own record."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.Accuracy import AccuracyStats
from speechbrain.utils.metric_stats import ErrorRateStats, MetricStats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from brain_lightning import (
    Checkpointer,
    FSDP2Strategy,
    ddp_barrier,
    ddp_broadcast,
    run_on_main,
    to_lightning,
)
from tests.parity.recipes import CLASSES, FEATURES, CountsSaves, adam, dataset, loader, make
from tests.parity.sides import OURS, Record, Side
from tests.support.brains import sgd, trainer_with
from tests.support.collectives import Collectives
from tests.support.sharded import wholes
from tests.trials import tried

# Of a Trainer that a scenario makes itself; see worker.py.
STRATEGY = os.environ.get("STRATEGY", "ddp")
PROCESSES = int(os.environ.get("WORLD_SIZE", "2"))
GLOO = {"distributed_backend": "gloo"}


def encoder_and_head(dropout: float = 0.2) -> dict[str, nn.Module]:
    """Without BatchNorm, with which SpeechBrain crashes in several processes on the CPU."""
    return {
        "encoder": nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Dropout(dropout)),
        "head": nn.Linear(8, CLASSES),
    }


class Layer(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.norm(self.linear(x))))


class Stack(nn.Module):
    """Layers that are called, each in its way, or recomputed in the backward pass."""

    def __init__(self, *recomputed: bool | None, outputs: int = CLASSES) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(FEATURES, 8), nn.Linear(8, outputs)
        self.layers = nn.ModuleList(Layer() for _ in recomputed)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for layer, is_reentrant in zip(self.layers, self.recomputed, strict=True):
            if is_reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=is_reentrant)
        return self.output(x)

    def extract_features(self, x: Tensor) -> Tensor:
        """As of a pretrained encoder."""
        return self(x)


def one_module(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    brain.fit(
        side.EpochCounter(3), dataset(), dataset(),
        train_loader_kwargs={"batch_size": 4}, valid_loader_kwargs={"batch_size": 5},
    )  # fmt: skip
    return brain


def dropout_and_two_entries(side: Side, record: Record) -> Any:
    brain = make(side, record, encoder_and_head(), run_opts=GLOO)
    kwargs = {"batch_size": 3, "drop_last": True}
    brain.fit(side.EpochCounter(3), dataset(), dataset(), train_loader_kwargs=kwargs)
    brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4})
    return brain


def in_order(side: Side, record: Record) -> Any:
    brain = make(side, record, hparams={"sorting": "ascending"}, run_opts=GLOO)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def a_sampler(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    kwargs = {"batch_size": 4, "sampler": SequentialSampler(dataset())}
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs=kwargs)
    return brain


class Batches:
    """Batches of another order in each epoch, as a DynamicBatchSampler draws them."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([(3 * i + self.epoch) % 20, (5 * i + 1) % 20] for i in range(6))


def a_batch_sampler(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    kwargs = {"batch_sampler": Batches()}
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs=kwargs)
    return brain


def a_dynamic_batch_sampler(side: Side, record: Record) -> Any:
    lengths = [1.0 + (7 * index) % 5 for index in range(20)]
    sampler = DynamicBatchSampler(
        dataset(), 8, num_buckets=3, lengths_list=lengths, shuffle=True, drop_last=False
    )
    brain = make(side, record, encoder_and_head(), run_opts=GLOO)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_sampler": sampler})
    return brain


def loaders_of_the_users(side: Side, record: Record) -> Any:
    brain = make(side, record, encoder_and_head(), run_opts=GLOO)
    brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
    return brain


def an_unused_entry(side: Side, record: Record) -> Any:
    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        return self.modules.head(self.modules.encoder(batch[0]))

    modules = {**encoder_and_head(), "unused": nn.Linear(2, 2)}
    brain = make(side, record, modules, run_opts=GLOO, compute_forward=compute_forward)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    record.results.append([type(module).__name__ for module in brain.modules.values()])
    return brain


def a_layer_that_one_process_leaves_out(side: Side, record: Record) -> Any:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES) for _ in range(2)])
            self.output, self.calls = nn.Linear(FEATURES, CLASSES), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            for index, layer in enumerate(self.layers):
                if (
                    not self.training
                    or (index + self.calls + torch.distributed.get_rank()) % 2
                ):
                    x = layer(x)
            return self.output(x)

    options = {**GLOO, "find_unused_parameters": True}
    brain = make(side, record, {"model": Dropping()}, run_opts=options)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def accumulation_counted(side: Side, record: Record) -> Any:
    """Counts the all-reduces: as many as there are updates, for each entry."""

    def on_fit_start(self: Any) -> None:
        side.Brain.on_fit_start(self)
        for module in self.modules.values():
            module.register_comm_hook(None, counted)

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        record.results.append((brain.step, bucket.buffer().numel()))
        averaged = bucket.buffer() / 2
        reduced = torch.distributed.all_reduce(averaged, async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    options = {**GLOO, "grad_accumulation_factor": 3}
    brain = make(side, record, encoder_and_head(), run_opts=options, on_fit_start=on_fit_start)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 1})
    assert brain.optimizer_step == 6
    assert len(record.results) == 12
    return brain


def one_collective_a_batch(side: Side, record: Record) -> Any:
    """Of a step of ours, of one by hand around it, and of one all by hand, which may save."""

    def fitting(self: Any, stage: Any, epoch: Any = None) -> None:
        """Takes a step before there is a batch, as one that warms up does."""
        self.step = 1
        side.Brain.fit_batch(self, next(iter(DataLoader(dataset(), 2))))
        self.step = 0

    def around(self: Any, batch: Any) -> Any:
        return side.Brain.fit_batch(self, batch)

    def by_hand(self: Any, batch: Any) -> Any:
        outputs = self.compute_forward(batch, side.Stage.TRAIN)
        loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
        loss.backward()
        self.optimizers_step()
        return loss.detach()

    for hooks in (
        {"on_stage_start": fitting}, {"fit_batch": around}, {"fit_batch": by_hand}
    ):  # fmt: skip
        brain = make(
            side, record, encoder_and_head(), checkpointer=Checkpointer(tempfile.mkdtemp()),
            run_opts={**GLOO, "ckpt_interval_minutes": 15},
            **hooks,
        )  # fmt: skip
        counts: list[int] = []
        brain.modules.encoder.register_forward_pre_hook(
            lambda *_, counts=counts: counts.append(counter.count)
        )
        with Collectives() as counter:
            brain.fit(range(1), dataset(), train_loader_kwargs={"batch_size": 1})
        # After the first batch DDP makes its buckets anew.
        record.results.append({b - a for a, b in itertools.pairwise(counts[2:])})
    return brain


def accumulated_by_tokens(side: Side, record: Record) -> Any:
    """Unequal batches in each process; and by hand, in one, each window of them as a batch."""
    sizes = [(1, 6, 3, 2), (4, 2, 5, 7), (2, 1, 8, 3)][:PROCESSES]
    x, y = dataset(sum(map(sum, sizes)))[:]
    each_size = [*itertools.chain(*sizes)]
    parts = zip(x.double().split(each_size), y.split(each_size), strict=True)
    batches = [list(itertools.islice(parts, 4)) for _ in sizes]

    def around(self: Any, batch: Any) -> Any:
        return side.Brain.fit_batch(self, batch)

    # There we average gradients ourselves.
    together = {} if STRATEGY == "fsdp2" else {"oom_patience": 0}
    # Clipped to a norm, gradients of any size would be the same.
    for window, norm, hooks, more in (
        (2, 0.0, {}, {}), (4, 0.1, {"fit_batch": around}, {}), (1, 0.0, {}, {}),
        (2, 0.0, {}, together),
    ):  # fmt: skip
        options = {"accumulate_by": "tokens", "grad_accumulation_factor": window, **more}
        brain = make(
            side, record, {"model": nn.Linear(FEATURES, CLASSES).double()}, opt_class=sgd,
            run_opts={**GLOO, **options, "max_grad_norm": norm},
            loss_weight=lambda self, batch: len(batch[1]), **hooks,
        )  # fmt: skip
        by_hand = copy.deepcopy(brain.modules.model)
        brain.fit(range(2), DataLoader(batches[int(os.environ["RANK"])], batch_size=None))
        optimizer = sgd(by_hand.parameters())
        for start in [*range(0, 4, window)] * 2:
            several = [batch for each in batches for batch in each[start : start + window]]
            inputs, targets = map(torch.cat, zip(*several, strict=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(inputs), targets).backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), norm or torch.inf)
            optimizer.step()
        found = wholes(dict(brain.modules.named_parameters())).values()
        for mine, other in zip(found, by_hand.parameters(), strict=True):
            assert (mine - other).abs().max() < 1e-12
    return brain


def fit_batch_by_hand(side: Side, record: Record) -> Any:
    def fit_batch(self: Any, batch: Any) -> Any:
        should_step = self.step % 2 == 0
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, side.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            self.scaler.scale(loss / 2).backward()
        if should_step:
            self.optimizers_step()
        return loss.detach().cpu()

    options = {**GLOO, "precision": "bf16"}
    brain = make(side, record, encoder_and_head(), run_opts=options, fit_batch=fit_batch)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 2})
    return brain


def fit_twice(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO, opt_class=_momentum)
    brain.fit(side.EpochCounter(1), dataset(), train_loader_kwargs={"batch_size": 4})
    brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4})
    return brain


def unfrozen_between_two_fits(side: Side, record: Record) -> Any:
    """SpeechBrain wraps anew, around its first wrapper; the names differ, not the weights."""
    modules = encoder_and_head(dropout=0.0)
    modules["encoder"][0].requires_grad_(False)
    brain = make(side, record, modules, run_opts=GLOO, opt_class=_momentum)
    kwargs = {"batch_size": 4}
    brain.fit(side.EpochCounter(1), dataset(), train_loader_kwargs=kwargs)
    for parameter in brain.modules.parameters():
        parameter.requires_grad_(True)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs=kwargs)
    for name, module in brain.modules.items():
        inner = module.module
        brain.modules[name] = inner if hasattr(inner, "module") else module
    record.events.clear()
    record.tensors.clear()
    return brain


class Statistics(nn.Module):
    """Running statistics of each process's own, as of a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


def statistics_are_kept_by_evaluate(side: Side, record: Record) -> Any:
    modules = {"normalize": Statistics(), **encoder_and_head(dropout=0.0)}
    brain = make(side, record, modules, run_opts=GLOO)
    kwargs = {"batch_size": 4}
    brain.fit(side.EpochCounter(1), dataset(), train_loader_kwargs=kwargs)
    record.results.append(brain.modules.normalize.mean.tolist())
    record.results.append(brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4}))
    record.results.append(brain.modules.normalize.mean.tolist())
    return brain


def evaluated_on_the_main_process_alone(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    brain.fit(side.EpochCounter(1), dataset(), train_loader_kwargs={"batch_size": 4})
    if brain.rank == 0:
        record.results.append(brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4}))
    return brain


def _momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def gan_brain(side: Side, record: Record) -> Any:
    """A generator and a discriminator, each with an optimizer, two updates a batch."""

    def init_optimizers(self: Any) -> None:
        self.optimizer_g = adam(self.modules.generator.parameters())
        self.optimizer_d = adam(self.modules.discriminator.parameters())
        self.optimizers_dict = {"g": self.optimizer_g, "d": self.optimizer_d}

    def fit_batch(self: Any, batch: Any) -> Any:
        real = batch[0]
        fake = self.modules.generator(torch.randn(len(real), 3))
        bce = nn.functional.binary_cross_entropy_with_logits
        scores = self.modules.discriminator(torch.cat([real, fake.detach()]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        loss_d = bce(scores, truth)
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()
        loss_g = bce(self.modules.discriminator(fake), torch.ones(len(real), 1))
        self.optimizer_g.zero_grad()
        loss_g.backward()
        self.optimizer_g.step()
        return (loss_d + loss_g).detach()

    def evaluate_batch(self: Any, batch: Any, stage: Any) -> Any:
        return self.modules.discriminator(batch[0]).mean().detach()

    modules = {
        "generator": nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, FEATURES)),
        "discriminator": nn.Sequential(
            nn.Linear(FEATURES, 8), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        ),
    }
    return make(
        side, record, modules, run_opts=GLOO,
        init_optimizers=init_optimizers, fit_batch=fit_batch, evaluate_batch=evaluate_batch,
    )  # fmt: skip


def gan(side: Side, record: Record) -> Any:
    brain = gan_brain(side, record)
    kwargs = {"batch_size": 4}
    brain.fit(side.EpochCounter(3), dataset(), dataset(), train_loader_kwargs=kwargs)
    assert not brain.find_unused_parameters
    return brain


# ------------------------------------------------------------ with a Trainer of the user's


class SamplerSeen(Callback):
    epoch = None

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.epoch = module.brain.train_sampler[0].epoch


def _on_a_trainer(record: Record, brain: Any, *callbacks: Any, **kwargs: Any) -> Any:
    given = {"devices": PROCESSES, "strategy": STRATEGY, "max_epochs": 3, **kwargs}
    sampler = SamplerSeen()
    trainer = trainer_with(sampler, *callbacks, **given)
    trainer.fit(to_lightning(brain), DataLoader(dataset(), 4, shuffle=True), None)
    record.results.append((trainer.global_step, sampler.epoch))
    assert brain.train_sampler is None
    return brain


def searched_before_training(side: Side, record: Record) -> Any:
    """What all processes find together leaves nothing behind in any of them."""

    def search(kind: str, memory: int) -> tuple[Any, Any]:
        folder = Path(tempfile.mkdtemp())
        brain, watched, error = tried.search(
            folder, kind, side, strategy=STRATEGY, memory=memory
        )
        assert error is None, error
        assert watched.before == watched.after
        return brain, watched.found[0]

    record.results.append(search("rate", tried.ITEMS)[1].results)
    if STRATEGY == "ddp":
        # In shards processes cannot go on where one of them has no memory.
        assert search("size", tried.MEMORY)[1] == tried.MEMORY
    brain, found = search("size", tried.ITEMS)
    record.results.append(found)
    return brain


def gan_on_the_users_trainer(side: Side, record: Record) -> Any:
    return _on_a_trainer(record, gan_brain(side, record))


def automatic_on_the_users_trainer(side: Side, record: Record) -> Any:
    modules = {**encoder_and_head(), "unused": nn.Linear(2, 2)}

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        record.results.append(batch[1].tolist())
        return self.modules.head(self.modules.encoder(batch[0]))

    brain = make(side, record, modules, compute_forward=compute_forward)
    return _on_a_trainer(record, brain)


def the_loaders_as_they_are(side: Side, record: Record) -> Any:
    heard = logging.getLogger("brain_lightning.lightning_internals.loaders")
    handler = Heard(record)
    heard.addHandler(handler)
    brain = make(side, record)
    trainer = trainer_with(devices=PROCESSES, strategy=STRATEGY, use_distributed_sampler=False)
    trainer.fit(to_lightning(brain), loader(record, brain), loader(record, brain))
    heard.removeHandler(handler)
    return brain


def names_in_a_checkpoint(side: Side, record: Record) -> Any:
    brain = _on_a_trainer(record, make(side, record, encoder_and_head()))
    module = to_lightning(brain)
    record.results.append(list(module.state_dict()))
    module.load_state_dict({n: torch.zeros_like(w) for n, w in module.state_dict().items()})
    record.results.append([p.any().item() for p in brain.modules.parameters()])
    return brain


def a_batch_sampler_on_the_users_trainer(side: Side, record: Record) -> Any:
    brain = make(side, record)
    trainer = trainer_with(devices=PROCESSES, strategy=STRATEGY)
    kwargs = {"batch_sampler": Batches()}
    brain.fit(range(1, 3), dataset(), train_loader_kwargs=kwargs, trainer=trainer)
    return brain


def a_batch_sampler_that_cannot_be_shared_out(side: Side, record: Record) -> Any:
    brain = make(side, record)
    trainer = trainer_with(devices=PROCESSES, strategy=STRATEGY)
    try:
        trainer.fit(to_lightning(brain), DataLoader(dataset(), batch_sampler=Batches()), None)
    except ValueError as error:
        record.results.append(str(error))
    return brain


def a_saveable_loader(side: Side, record: Record) -> Any:
    class Recoverables(CountsSaves):
        recoverables: dict[str, Any]

    train = SaveableDataLoader(dataset(), batch_size=4)
    checkpointer = Recoverables(record)
    checkpointer.recoverables = {"dataloader-TRAIN": train}
    brain = make(side, record, checkpointer=checkpointer)
    trainer = trainer_with(devices=PROCESSES, strategy=STRATEGY)
    trainer.fit(to_lightning(brain), train, None)
    saved = checkpointer.recoverables["dataloader-TRAIN"]
    record.results.append((type(saved).__name__, saved is train, len(saved)))
    return brain


def a_strategy_instance_used_again(side: Side, record: Record) -> Any:
    brain = make(
        side,
        record,
        hparams={
            "trainer": {"strategy": FSDP2Strategy() if STRATEGY == "fsdp2" else DDPStrategy()}
        },
    )
    for _ in range(2):
        brain.fit(range(1), dataset(), train_loader_kwargs={"batch_size": 4})
        record.results.append(brain.evaluate(dataset(), test_loader_kwargs={"batch_size": 4}))
    return brain


def unfrozen_when_a_stage_starts(side: Side, record: Record) -> Any:
    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and epoch == 2:
            self.modules.encoder.requires_grad_(True)

    modules = encoder_and_head(dropout=0.0)
    modules["encoder"].requires_grad_(False)
    brain = make(side, record, modules, run_opts=GLOO, on_stage_start=on_stage_start)
    brain.fit(side.EpochCounter(3), dataset(), train_loader_kwargs={"batch_size": 4})
    return brain


def compiled_and_fitted_twice(side: Side, record: Record) -> Any:
    brain = make(side, record, {"model": Stack(None)}, run_opts={**GLOO, "compile": True})
    # Its names are the same, whatever it is compiled to.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        for _ in range(2):
            brain.fit(range(1), dataset(), train_loader_kwargs={"batch_size": 5})
    record.results.append(list(to_lightning(brain).state_dict()))
    return brain


class Heard(logging.Handler):
    def __init__(self, record: Record) -> None:
        super().__init__(logging.WARNING)
        self.record = record

    def emit(self, message: logging.LogRecord) -> None:
        self.record.results.append(message.getMessage())


def batchnorm_stays_local(side: Side, record: Record) -> Any:
    handler = Heard(record)
    logging.getLogger("brain_lightning.distributed.ddp").addHandler(handler)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    brain = make(side, record, {"model": model}, run_opts=GLOO)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    logging.getLogger("brain_lightning.distributed.ddp").removeHandler(handler)
    return brain


def called_around_its_wrapper(side: Side, record: Record) -> Any:
    modules = encoder_and_head(dropout=0.0)
    handler = Heard(record)
    logging.getLogger("brain_lightning.distributed.ddp").addHandler(handler)

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        return self.modules.head(self.hparams.encoder(batch[0]))

    brain = make(
        side, record, modules, run_opts=GLOO, hparams={"encoder": modules["encoder"]},
        compute_forward=compute_forward,
    )  # fmt: skip
    brain.fit(side.EpochCounter(1), dataset(), train_loader_kwargs={"batch_size": 4})
    logging.getLogger("brain_lightning.distributed.ddp").removeHandler(handler)
    record.tensors.clear()
    return brain


def nan_on_one_rank(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        loss = nn.functional.cross_entropy(predictions, batch[1])
        return loss * torch.nan if self.rank == 1 and self.step == 2 else loss

    brain = make(side, record, run_opts=GLOO, compute_objectives=compute_objectives)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    record.results.append((brain.optimizer_step, brain.nonfinite_count))
    return brain


def nan_on_one_rank_ends_a_window(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        loss = nn.functional.cross_entropy(predictions, batch[1])
        return loss * torch.nan if self.rank == 1 and self.step == 2 else loss

    options = {**GLOO, "grad_accumulation_factor": 2}
    brain = make(side, record, run_opts=options, compute_objectives=compute_objectives)
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 2})
    record.results.append((brain.optimizer_step, brain.nonfinite_count))
    return brain


def nan_on_one_rank_of_a_fit_batch_of_0_5(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        loss = nn.functional.cross_entropy(predictions, batch[1])
        return loss * torch.nan if self.rank == 1 and self.step == 2 else loss

    def fit_batch(self: Any, batch: Any) -> Any:
        outputs = self.compute_forward(batch, side.Stage.TRAIN)
        loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
        if self.check_gradients(loss):
            loss.backward()
            self.optimizer.step()
            self.zero_grad()
            self.optimizer_step += 1
        return loss.detach().cpu()

    # A name that the recipe has for itself must not decide how data are shared out.
    brain = make(side, record, run_opts=GLOO, compute_objectives=compute_objectives,
                 fit_batch=fit_batch, world_size="large")  # fmt: skip
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    record.results.append((brain.optimizer_step, brain.nonfinite_count))
    return brain


def patience_exhausted_by_one_rank(side: Side, record: Record) -> Any:
    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        loss = nn.functional.cross_entropy(predictions, batch[1])
        return loss * torch.nan if self.rank == 1 else loss

    options = {**GLOO, "nonfinite_patience": 1}
    brain = make(side, record, run_opts=options, compute_objectives=compute_objectives)
    try:
        brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    except ValueError as error:
        record.results.append((brain.step, type(error).__name__))
    return brain


def reported_by_the_main_process(side: Side, record: Record) -> Any:
    class TrainLogger:
        def log_stats(self, stats_meta: Any, valid_stats: Any) -> None:
            pass

    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID" and self.rank == 0:
            self.hparams.train_logger.log_stats({"epoch": epoch}, {"WER": 7.0 + epoch})

    hparams = {"train_logger": TrainLogger()}
    brain = make(side, record, hparams=hparams, on_stage_end=on_stage_end)
    trainer = trainer_with(devices=PROCESSES, strategy=STRATEGY)
    batches = DataLoader(dataset(), 4)
    trainer.fit(to_lightning(brain), batches, batches)
    record.results.append(float(trainer.callback_metrics["WER"]))
    return brain


def shards_of_different_lengths(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    mine = Subset(dataset(), range(12 + 4 * brain.rank))
    try:
        brain.fit(side.EpochCounter(2), DataLoader(mine, 4))
    except ValueError as error:
        record.results.append((type(error).__name__, str(error), brain.step))
    return brain


class Stream(IterableDataset[Any]):
    """Without a length, and longer on the first rank."""

    def __init__(self, rank: int) -> None:
        self.items = 22 if rank == 0 else 13

    def __iter__(self) -> Iterator[Any]:
        yield from (dataset()[index % 20] for index in range(self.items))


def streams_of_different_lengths(side: Side, record: Record) -> Any:
    handler = Heard(record)
    logging.getLogger("brain_lightning.stages.train").addHandler(handler)
    brain = make(side, record, run_opts=GLOO)
    brain.fit(side.EpochCounter(2), DataLoader(Stream(brain.rank), 4), dataset())
    logging.getLogger("brain_lightning.stages.train").removeHandler(handler)
    record.results.append(brain.optimizer_step)
    return brain


def a_stream_without_anything_on_one_rank(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    data = Stream(brain.rank)
    data.items *= 1 - brain.rank
    brain.fit(side.EpochCounter(1), DataLoader(data, 4), dataset())
    record.results.append([event[:2] for event in record.events if "stage" in event[0]])
    return brain


def a_validation(record: Record, **run_opts: Any) -> Any:
    """Rates of 101 items; their order is another one where it is shared out."""

    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        self.words, self.accuracy = ErrorRateStats(), AccuracyStats()
        self.hparams.losses.clear()

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        if stage.name == "VALID":
            ids = [str(float(x.sum())) for x in batch[0]]
            found = predictions.argmax(1)
            self.words.append(ids, found[:, None].tolist(), batch[1][:, None].tolist())
            self.accuracy.append(
                predictions.log_softmax(1)[:, None], batch[1][:, None], torch.ones(len(ids))
            )
            self.hparams.losses.append(ids, predictions, batch[1], reduction="none")
            record.results.append(len(ids))
        return nn.functional.cross_entropy(predictions, batch[1])

    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            rates = (
                stage_loss,
                self.words.summarize("error_rate"),
                self.accuracy.summarize(),
                self.hparams.losses.summarize("average"),
            )
            record.results.append(
                (rates, sorted(self.words.ids), len(self.hparams.losses.ids))
            )

    # An entry that is left out, as `lm: null` in YAML: SpeechBrain cannot wrap it.
    modules = {**encoder_and_head(0.0), "lm": None}
    brain = make(
        OURS, record, modules, run_opts={**GLOO, **run_opts},
        hparams={"losses": MetricStats(nn.functional.cross_entropy)},
        on_stage_start=on_stage_start, on_stage_end=on_stage_end,
        compute_objectives=compute_objectives,
    )  # fmt: skip
    record.results.clear()
    return brain


def fit_and_validate(side: Side, record: Record, shard_eval: bool) -> Any:
    torch.manual_seed(5)
    brain = a_validation(record, shard_eval=shard_eval)
    generator = torch.Generator().manual_seed(4)
    valid = TensorDataset(
        torch.randn(101, FEATURES, generator=generator),
        torch.randint(CLASSES, (101,), generator=generator),
    )
    brain.fit(
        range(1, 3), dataset(), valid,
        train_loader_kwargs={"batch_size": 4}, valid_loader_kwargs={"batch_size": 8},
    )  # fmt: skip
    return brain


def a_whole_validation(side: Side, record: Record) -> Any:
    return fit_and_validate(side, record, shard_eval=False)


def a_validation_that_is_shared_out(side: Side, record: Record) -> Any:
    return fit_and_validate(side, record, shard_eval=True)


class Lazy:
    """Counts in what its first batch makes, with tensors."""

    def __init__(self) -> None:
        self.correct: Any = 0

    def append(self, found: Tensor, expected: Tensor) -> None:
        self.correct = self.correct + (found == expected).sum()
        self.seen: list[Tensor]
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.extend(found)

    def summarize(self) -> tuple[int, int]:
        return int(self.correct), len(self.seen)


def counted_with_tensors(side: Side, record: Record) -> Any:
    """On as many batches as there are processes, and on one alone; and on a limited number."""

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        if stage.name == "VALID":
            self.lazy.append(batch[1], batch[1])
            self.count += len(batch[1])
        return nn.functional.cross_entropy(predictions, batch[1])

    def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            record.results.append(self.lazy.summarize())

    handler = Heard(record)
    logging.getLogger("brain_lightning.stages.sharded_evaluation").addHandler(handler)
    for size, trainer in ((5, {}), (20, {}), (5, {"limit_val_batches": 3})):
        brain = make(
            side, record, run_opts={**GLOO, "shard_eval": True},
            compute_objectives=compute_objectives, on_stage_end=on_stage_end,
        )  # fmt: skip
        brain.lazy, brain.count = Lazy(), torch.zeros((), dtype=torch.int64)
        brain.fit(
            range(1), dataset(), dataset(), train_loader_kwargs={"batch_size": 5},
            valid_loader_kwargs={"batch_size": size}, trainer=trainer,
        )  # fmt: skip
    logging.getLogger("brain_lightning.stages.sharded_evaluation").removeHandler(handler)
    record.events.clear()
    record.tensors.clear()
    return brain


def limited_to_the_same_length(side: Side, record: Record) -> Any:
    brain = make(side, record, run_opts=GLOO)
    mine = DataLoader(Subset(dataset(), range(12 + 4 * brain.rank)), 4)
    brain.fit(side.EpochCounter(1), mine, trainer={"limit_train_batches": 3})
    record.results.append(brain.optimizer_step)
    return brain


def more_processes_than_batches(side: Side, record: Record) -> Any:
    """And buffers, which DDP brings together in the first evaluation batch."""
    modules = {"normalize": Statistics(), **encoder_and_head(dropout=0.0)}
    brain = make(side, record, modules, run_opts={**GLOO, "shard_eval": True})
    kwargs = {"batch_size": 20}
    sets = {"one": dataset(), "several": DataLoader(dataset(), 5), "last": dataset()}
    brain.fit(
        range(1, 3), dataset(), sets,
        train_loader_kwargs={"batch_size": 4}, valid_loader_kwargs=kwargs,
    )  # fmt: skip
    record.results.extend(loss for stage, _, loss in record.stage_losses if stage == "VALID")
    return brain


def on_the_main_process(side: Side, record: Record) -> Any:
    def work(number: int) -> tuple[int, int]:
        # What processes do together is done alone here.
        ddp_barrier()
        return number, ddp_broadcast(torch.distributed.get_rank(), src=1)

    def fail() -> None:
        raise OSError("the disk is full")

    seen: list[Any] = []
    record.results.append(run_on_main(work, (3,), post_func=seen.append, post_args=(4,)))
    record.results.append((seen, ddp_broadcast(torch.distributed.get_rank(), src=1)))
    for failing in (fail, lambda: lambda: "not to be sent"):
        record.results.append(_failure_of(failing))
    return make(side, record)


def _failure_of(function: Any) -> tuple[str, str]:
    try:
        run_on_main(function)
    except Exception as error:  # noqa: BLE001  what it is, the test says
        return type(error).__name__, str(error)
    return "nothing", ""


def batchnorm_on_a_gpu(side: Side, record: Record) -> Any:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    options = {"device": "cuda:0", "distributed_backend": "nccl"}

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        return self.modules.model(batch[0].to(self.device))

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Tensor:
        return nn.functional.cross_entropy(predictions, batch[1].to(self.device))

    brain = make(
        side, record, {"model": model}, run_opts=options,
        compute_forward=compute_forward, compute_objectives=compute_objectives,
    )  # fmt: skip
    brain.fit(side.EpochCounter(2), dataset(), train_loader_kwargs={"batch_size": 4})
    record.results.append(type(brain.modules.model.module[1]).__name__)
    return brain


# Run by both sides on one GPU.
ON_A_GPU = [batchnorm_on_a_gpu]
# Run by both sides, which must give the same.
SHARED = [
    one_module, dropout_and_two_entries, in_order, a_sampler, a_batch_sampler,
    a_dynamic_batch_sampler,
    loaders_of_the_users, an_unused_entry, accumulation_counted, fit_batch_by_hand, fit_twice,
    unfrozen_between_two_fits, statistics_are_kept_by_evaluate,
    evaluated_on_the_main_process_alone, gan,
]  # fmt: skip
# Run by ours alone, for SpeechBrain has no Trainer, crashes or hangs.
OWN = [
    searched_before_training, gan_on_the_users_trainer,
    automatic_on_the_users_trainer, the_loaders_as_they_are,
    names_in_a_checkpoint, batchnorm_stays_local, called_around_its_wrapper,
    nan_on_one_rank, nan_on_one_rank_ends_a_window, nan_on_one_rank_of_a_fit_batch_of_0_5,
    patience_exhausted_by_one_rank, reported_by_the_main_process,
    a_batch_sampler_that_cannot_be_shared_out,
    a_saveable_loader, a_strategy_instance_used_again, unfrozen_when_a_stage_starts,
    compiled_and_fitted_twice, shards_of_different_lengths, streams_of_different_lengths,
    a_stream_without_anything_on_one_rank, a_whole_validation, a_validation_that_is_shared_out,
    more_processes_than_batches, on_the_main_process, counted_with_tensors,
    limited_to_the_same_length, a_layer_that_one_process_leaves_out,
    one_collective_a_batch, accumulated_by_tokens,
]  # fmt: skip
# The same, with a Trainer given to brain.fit.
ON_A_TRAINER = [a_batch_sampler_on_the_users_trainer]
