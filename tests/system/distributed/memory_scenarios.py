"""One of two processes has no memory for a batch; run by ours alone."""

from __future__ import annotations

import itertools
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from brain_lightning import Checkpointer, UnsupportedError, ddp_broadcast
from brain_lightning.step.out_of_memory import notes
from tests.parity.recipes import CLASSES, FEATURES, dataset, make
from tests.parity.sides import Record, Side
from tests.support.collectives import Collectives
from tests.trials import tried

from . import scenarios
from .scenarios import GLOO, Heard

# The epoch, the step and the rank, and where; in a window of two the last and the first batch.
FAILURES = {
    (1, 2, 1): "forward", (1, 5, 0): "backward", (2, 1, 1): "backward", (2, 4, 0): "forward",
}  # fmt: skip


class Full(nn.Module):
    """Between two parts of a model; has no memory where it is told so."""

    fails = ""

    def forward(self, x: Tensor) -> Any:
        if self.fails == "forward":
            raise torch.OutOfMemoryError
        if self.fails == "backward":
            x = x.clone()
            x.register_hook(self._fail)
        return x

    def _fail(self, _: Tensor) -> None:
        raise torch.OutOfMemoryError


def modules() -> dict[str, nn.Module]:
    """The first has buffers, which the second process gets in its forward pass."""
    encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    return {"encoder": encoder, "full": Full(), "head": nn.Linear(8, CLASSES)}


def brain_of(
    side: Side, record: Record, failures: Any, folder: Any = None, **options: Any
) -> Any:
    """A Brain that fails on one rank, in ``fit_batch`` of ours or around it."""

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        now = (self.hparams.epoch_counter.current, self.step, self.rank)
        training = stage.name == "TRAIN"
        self.modules.full.fails = failures.get(now, "") if training else ""
        x = batch[0]
        for module in self.modules.children():
            x = module(x)
        return x

    namespace: dict[str, Any] = {"compute_forward": compute_forward}
    if options.pop("around", False):
        namespace["fit_batch"] = lambda self, batch: side.Brain.fit_batch(self, batch)
    counter = side.EpochCounter(2)
    checkpointer = None
    torch.manual_seed(3)
    if folder is not None:
        checkpointer = Checkpointer(folder, {"counter": counter})
    brain = make(
        side, record, modules(), run_opts={**GLOO, **options}, checkpointer=checkpointer,
        hparams={"epoch_counter": counter}, **namespace,
    )  # fmt: skip
    if checkpointer is not None:
        checkpointer.add_recoverables({"modules": brain.modules})
    return brain


def fit(brain: Any) -> Any:
    torch.manual_seed(5 + brain.rank)
    kwargs = {"batch_size": 2, "shuffle": True}
    brain.fit(brain.hparams.epoch_counter, dataset(), dataset(), train_loader_kwargs=kwargs)
    return brain


def state(brain: Any) -> list[Any]:
    own = brain.optimizer.state_dict()["state"]
    values = [value for each in own.values() for value in each.values()]
    return [brain.optimizer_step, *brain.modules.state_dict().values(), *values]


def skipping_by_hand(side: Side, record: Record, factor: int) -> Any:
    """What DDP does where no process has fitted the batches."""

    def fit_batch(self: Any, batch: Any) -> Any:
        epoch = self.hparams.epoch_counter.current
        if not any((epoch, self.step, rank) in FAILURES for rank in (0, 1)):
            return side.Brain.fit_batch(self, batch)
        if factor > 1 and self.step % factor == 0:
            with torch.no_grad():
                for p in self.modules.parameters():
                    torch.distributed.all_reduce(p.grad.mul_(0.5))
            self.optimizers_step()
        return torch.tensor(torch.nan)

    brain = brain_of(side, record, {}, grad_accumulation_factor=factor)
    type(brain).fit_batch = fit_batch
    return fit(brain)


def skipped_by_all(side: Side, record: Record) -> Any:
    """A batch for which one process has no memory."""
    handler = Heard(record)
    logger = logging.getLogger("brain_lightning.stages.train")
    for factor in (1, 2):
        expected = state(skipping_by_hand(side, Record(), factor))
        for around in (False, True):
            logger.addHandler(handler)
            options = {"oom_patience": 2, "grad_accumulation_factor": factor}
            found = fit(brain_of(side, Record(), FAILURES, around=around, **options))
            logger.removeHandler(handler)
            same = [
                torch.equal(torch.as_tensor(one), torch.as_tensor(other))
                for one, other in zip(expected, state(found), strict=True)
            ]
            record.results.append((all(same), found.optimizer_step))
    return found


def ended_by_all(side: Side, record: Record) -> Any:
    """Patience is exhausted by one process; all save, and resume."""
    folder = ddp_broadcast(tempfile.mkdtemp())
    options = {"oom_patience": 1, "grad_accumulation_factor": 2}
    first = {(1, 2, 0): "forward"}
    whole = fit(brain_of(side, Record(), first, **options))
    for failures in ({**first, (1, 3, 1): "backward"}, {(1, 5, 0): "forward"}):
        record.results.append(
            _failure_of(brain_of(side, Record(), failures, folder, **options))
        )
    resumed = fit(brain_of(side, Record(), {}, folder, **options))
    for one, other in zip(state(whole), state(resumed), strict=True):
        record.results.append(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))
    return resumed


def _failure_of(brain: Any) -> tuple[str, str]:
    try:
        fit(brain)
    except torch.OutOfMemoryError as error:
        return str(error), notes(error)[-1]
    return "", ""


def not_agreed_upon(side: Side, record: Record) -> Any:
    """Without the option, or where processes do not ask; here both fail, for none may wait."""
    folder = ddp_broadcast(tempfile.mkdtemp())
    both = {(1, 3, rank): "forward" for rank in (0, 1)}
    failed = brain_of(side, Record(), both, folder)
    record.results.append(_failure_of(failed)[1])

    def fit_batch(self: Any, batch: Any) -> Any:
        self.compute_objectives(self.compute_forward(batch, None), batch, None).backward()

    brain = make(side, Record(), run_opts={**GLOO, "oom_patience": 1}, fit_batch=fit_batch)
    static = make(side, Record(), run_opts={**GLOO, "oom_patience": 1})
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=True)
    record.results += [_refusal_of(brain), _refusal_of(static, strategy=strategy)]
    return failed


def _refusal_of(brain: Any, **trainer: Any) -> str:
    try:
        brain.fit(range(1), dataset(), trainer=trainer)
    except UnsupportedError as error:
        return str(error)
    return ""


def what_it_costs(side: Side, record: Record) -> Any:
    """Collectives of a batch: of its flags, buffers and gradients."""
    brain = brain_of(side, Record(), {}, oom_patience=1)
    counts: list[tuple[int, int]] = []
    brain.modules.full.register_forward_pre_hook(
        lambda *_: counts.append((counter.count, counter.gradients))
    )
    with Collectives() as counter:
        fit(brain)
    # Of the first epoch.
    pairs = itertools.pairwise(counts[:5])
    record.results.append({(b[0] - a[0], b[1] - a[1]) for a, b in pairs})
    return brain


def tried_by_all(side: Side, record: Record) -> Any:
    """A batch size for which the second process alone has no memory."""
    folder = Path(ddp_broadcast(tempfile.mkdtemp()))
    fails = 1 - torch.distributed.get_rank()
    brain, watched, error = tried.search(
        folder, "size", side, strategy="ddp", rank_that_fails=fails
    )
    record.results.append((watched.found, error))
    record.results.append(watched.before == watched.after != [])
    return brain


class Centered(nn.Linear):
    """Its result depends on a buffer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += x.detach().mean()
        return super().forward(x - self.mean)


def an_entry_without_gradients(side: Side, record: Record) -> Any:
    """Buffers of an entry are made those of the first process after a backward pass of it."""

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        with torch.no_grad():
            x = self.modules.fixed(batch[0])
        return self.modules.head(x)  # type: ignore[no-any-return]

    parts = {"fixed": Centered(FEATURES, FEATURES), "head": Centered(FEATURES, CLASSES)}
    brain = make(side, record, parts, run_opts=GLOO, compute_forward=compute_forward)
    brain.fit(range(1), dataset(), train_loader_kwargs={"batch_size": 2})
    record.results.append(brain.modules.fixed.module.mean.clone())
    return brain


SCENARIOS = [
    skipped_by_all, ended_by_all, not_agreed_upon, what_it_costs, tried_by_all,
    an_entry_without_gradients,
]  # fmt: skip
# Run with the option too, where no process fails.
AVERAGED = [
    scenarios.one_module, scenarios.dropout_and_two_entries, scenarios.an_unused_entry,
    scenarios.unfrozen_between_two_fits, scenarios.nan_on_one_rank,
    scenarios.batchnorm_stays_local, an_entry_without_gradients,
]  # fmt: skip
