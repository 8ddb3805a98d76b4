"""Two processes that differ in what they find: what each of them did, and was told.

``torchrun --nproc_per_node=2 -m tests.system.distributed.disagreements FOLDER``
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import speechbrain.utils.epoch_loop as theirs
import torch
from lightning.pytorch import Callback
from speechbrain.core import Brain as TheirBrain
from speechbrain.utils.checkpoints import Checkpointer as TheirCheckpointer
from torch import nn
from torch.utils.data import TensorDataset

from brain_lightning import (
    Brain,
    Checkpointer,
    EpochCounter,
    EpochCounterWithStopper,
    ddp_barrier,
    patch_speechbrain,
)
from brain_lightning.checkpoints import integrity, shared_recovery
from tests.support.environment import seed_everything

RANK = int(os.environ.get("RANK", 0))
MIDDLE = 2


class Recorder(logging.Handler):
    """Keeps the warnings of a scenario."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def toy(base: type, net: nn.Module, checkpointer: Any = None, **hooks: Any) -> Any:
    def compute_forward(self: Any, batch: Any, stage: Any) -> Any:
        return self.modules.model(batch[0])

    def compute_objectives(self: Any, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.mse_loss(predictions, batch[1])

    methods = {"compute_forward": compute_forward, "compute_objectives": compute_objectives}
    cls = type("Toy", (base,), {**methods, **hooks})
    options = {"device": "cpu", "distributed_backend": "gloo", "noprogressbar": True}
    return cls(
        {"model": net}, lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9), {},
        run_opts=options, checkpointer=checkpointer,
    )  # fmt: skip


def fit(brain: Any, counter: Any, **kwargs: Any) -> None:
    x = torch.linspace(0, 1, 24).reshape(8, 3)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    sizes = {
        "train_loader_kwargs": {"batch_size": 2},
        "valid_loader_kwargs": {"batch_size": 8},
    }
    brain.fit(counter, data, data, **sizes, **kwargs)


def model() -> nn.Module:
    """Each process begins with weights of its own."""
    torch.manual_seed(RANK)
    return nn.Linear(3, 1)


# ---------------------------------------------------------------------- who stops, and when


def stop(base: Any, counter: Any, stops: int) -> Any:
    """The number of one rank becomes worse in the third epoch."""

    def on_stage_end(self: Any, stage: Any, loss: Any, epoch: Any = None) -> None:
        if stage.name == "VALID":
            counter.update_metric(9.0 if stops == RANK and epoch > MIDDLE else 1 / epoch)

    fit(toy(base, model(), on_stage_end=on_stage_end), counter)
    return counter.current


def stopper_of_rank_0(folder: Path) -> Any:
    return stop(Brain, EpochCounterWithStopper(5, 1, 0, "min"), 0)


def stopper_of_rank_1(folder: Path) -> Any:
    return stop(Brain, EpochCounterWithStopper(5, 1, 0, "min"), 1)


def speechbrains_stopper(folder: Path) -> Any:
    with patch_speechbrain():
        return stop(TheirBrain, theirs.EpochCounterWithStopper(5, 1, 0, "min"), 0)


def ranges(folder: Path) -> Any:
    """Other than an EpochCounter, they cannot be set to an epoch."""
    epochs: list[Any] = []

    def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
        epochs.append((stage.name, epoch))

    fit(toy(Brain, model(), on_stage_start=on_stage_start), range(1, 4 - RANK))
    return epochs


def trainer_of_rank_1(folder: Path) -> Any:
    class Stops(Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = RANK == 1 and counter.current == MIDDLE

    counter = EpochCounter(4)
    fit(toy(Brain, model()), counter, trainer={"callbacks": [Stops()]})
    return counter.current


def epochs_apart(folder: Path) -> Any:
    counter = EpochCounter(4)
    counter.current = RANK
    fit(toy(Brain, model()), counter)


def updates_apart(folder: Path) -> Any:
    def on_fit_start(self: Any) -> None:
        Brain.on_fit_start(self)
        self.optimizer_step = 5 * RANK

    fit(toy(Brain, model(), on_fit_start=on_fit_start), EpochCounter(1))


# ------------------------------------------------------------------- disks of their own


def train(folder: Path, limit: int, kind: Any = Checkpointer, **hooks: Any) -> Any:
    """Trains with checkpoints in the folder: what was recovered, and learned."""
    net, counter, recovered = model(), EpochCounter(limit), []
    checkpointer = kind(folder, {"model": net, "counter": counter})

    def on_fit_start(self: Any) -> None:
        base.on_fit_start(self)
        recovered.append((counter.current, net.weight.detach().clone()))

    def on_stage_end(self: Any, stage: Any, loss: Any, epoch: Any = None) -> None:
        if stage.name == "VALID":
            checkpointer.save_and_keep_only(num_to_keep=9)

    base = Brain if kind is Checkpointer else TheirBrain
    hooks = {"on_fit_start": on_fit_start, "on_stage_end": on_stage_end, **hooks}
    with patch_speechbrain():
        fit(toy(base, net, checkpointer, **hooks), counter)
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    return [(counter.current, weights[0]), *recovered, weights]


def without_shared_disk(folder: Path, kind: Any = Checkpointer) -> Any:
    mine = folder / f"node{RANK}"
    learned, _, _ = train(mine, 2, kind)
    _, recovered, weights = train(mine, 4, kind)
    return learned, recovered, weights, len(list(mine.glob("CKPT*")))


def speechbrains_without_shared_disk(folder: Path) -> Any:
    return without_shared_disk(folder, TheirCheckpointer)


def with_shared_disk(folder: Path) -> Any:
    learned, _, _ = train(folder, 2)
    with mock.patch.object(shared_recovery, "_send", side_effect=AssertionError):
        _, recovered, weights = train(folder, 4)
    return learned, recovered, weights


def in_pieces(folder: Path) -> Any:
    with mock.patch.object(integrity, "PIECE", 100):
        return without_shared_disk(folder)


def saved_by_each(folder: Path, name: str = "one") -> tuple[Path, Any]:
    """A checkpoint of the same name on the disk of each, and not the same."""
    net = model()
    mine = folder / f"node{RANK}"
    counter = EpochCounter(9)
    counter.current = 1
    # As a process alone would.
    with alone():
        Checkpointer(mine, {"model": net, "counter": counter}).save_checkpoint(name=name)
    return mine, net


def alone() -> Any:
    """What a process does as if it were the only one."""
    module = "brain_lightning.distributed.communication"
    return mock.patch(f"{module}.is_distributed_initialized", return_value=False)


def recover(mine: Path, **hooks: Any) -> Any:
    net, counter = model(), EpochCounter(1)
    checkpointer = Checkpointer(mine, {"model": net, "counter": counter}, None, None, True)
    chosen: list[Any] = []

    def on_fit_start(self: Any) -> None:
        chosen.append(checkpointer.recover_if_possible())

    def init_optimizers(self: Any) -> None:
        self.optimizer = torch.optim.SGD(net.parameters(), 0.0)
        self.optimizers_dict = {"sgd": self.optimizer}

    hooks = {"on_fit_start": on_fit_start, "init_optimizers": init_optimizers, **hooks}
    fit(toy(Brain, net, checkpointer, **hooks), counter)
    path = chosen[0] and chosen[0].path
    return net.weight.detach(), path and str(path.relative_to(mine)), counter.current


def same_name_other_content(folder: Path) -> Any:
    mine, net = saved_by_each(folder)
    return recover(mine), net.weight.detach()


def damaged_on_rank_0(folder: Path) -> Any:
    """The newest of rank 0 is cut short; rank 1 has neither of the two."""
    mine, net = saved_by_each(folder, "old")
    saved_by_each(folder, "new")
    if RANK == 0:
        cut(mine / "CKPT+new" / "model.ckpt")
    else:
        shutil.rmtree(mine)
    return recover(mine), net.weight.detach()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def all_damaged_on_rank_0(folder: Path) -> Any:
    mine, _ = saved_by_each(folder)
    if RANK == 0:
        cut(mine / "CKPT+one" / "model.ckpt")
    return recover(mine)


def unreadable_on_rank_0(folder: Path) -> Any:
    """Its meta is damaged, and so it is not even listed."""
    mine, _ = saved_by_each(folder)
    if RANK == 0:
        cut(mine / "CKPT+one" / "CKPT.yaml")
    else:
        shutil.rmtree(mine)
    return recover(mine)


def speechbrains_damaged(folder: Path) -> Any:
    mine = folder / f"node{RANK}"
    train(mine, 1, TheirCheckpointer)
    for path in mine.glob("CKPT*/model.ckpt"):
        cut(path)
    train(mine, 2, TheirCheckpointer)


def damaged_on_rank_1(folder: Path) -> Any:
    """Of the same length, it is seen when it is read."""
    with alone():
        mine = folder / f"node{RANK}"
        torch.manual_seed(0)
        Checkpointer(mine, {"model": nn.Linear(3, 1)}).save_checkpoint(name="one")
    ddp_barrier()
    if RANK == 1:
        shutil.rmtree(mine)
        shutil.copytree(folder / "node0", mine)
        path = mine / "CKPT+one" / "model.ckpt"
        content = bytearray(path.read_bytes())
        at = content.index(torch.load(path)["weight"].numpy().tobytes())
        content[at] ^= 1
        path.write_bytes(content)
    return recover(mine)


def none_on_rank_0(folder: Path) -> Any:
    mine, _ = saved_by_each(folder)
    if RANK == 0:
        shutil.rmtree(mine)
    return recover(mine)


def no_space_on_rank_1(folder: Path) -> Any:
    mine, _ = saved_by_each(folder)
    full = OSError("no space left")
    with mock.patch.object(shared_recovery, "_append", side_effect=full):
        return recover(mine)


def recovered_on_rank_0_alone(folder: Path) -> Any:
    mine, _ = saved_by_each(folder)

    def on_fit_start(self: Any) -> None:
        if RANK == 0:
            self.checkpointer.recover_if_possible()

    return recover(mine, on_fit_start=on_fit_start)


def evaluated_on_rank_1_alone(folder: Path) -> Any:
    """With a metric that chooses the checkpoint: nobody waits for rank 0."""
    net = model()
    with alone():
        checkpointer = Checkpointer(folder / f"node{RANK}", {"model": net})
        checkpointer.save_checkpoint({"loss": 1.0})
    weight = net.weight.detach().clone()
    nn.init.zeros_(net.weight)
    if RANK == 1:
        x = torch.ones(2, 3)
        data = TensorDataset(x, x.sum(1, keepdim=True))
        checkpointer.allow_partial_load = True
        toy(Brain, net, checkpointer).evaluate(data, min_key="loss")
    return torch.equal(weight, net.weight)


SCENARIOS: list[Callable[[Path], Any]] = [
    stopper_of_rank_0, stopper_of_rank_1, speechbrains_stopper, ranges, trainer_of_rank_1,
    epochs_apart, updates_apart, without_shared_disk, speechbrains_without_shared_disk,
    with_shared_disk, in_pieces, same_name_other_content, damaged_on_rank_0,
    all_damaged_on_rank_0, unreadable_on_rank_0, speechbrains_damaged, damaged_on_rank_1,
    none_on_rank_0, no_space_on_rank_1, recovered_on_rank_0_alone, evaluated_on_rank_1_alone,
]  # fmt: skip


def outcome(scenario: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    recorder = Recorder()
    logging.getLogger("brain_lightning").addHandler(recorder)
    result = error = None
    try:
        result = scenario(folder / scenario.__name__)
    except Exception as raised:  # noqa: BLE001  whatever it is, the test shows it
        error = f"{type(raised).__name__}: {raised}"
    logging.getLogger("brain_lightning").removeHandler(recorder)
    return {"result": result, "error": error, "told": "\n".join(recorder.told)}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A rank that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=90)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    seed_everything(1)
    outcomes = {row.__name__: outcome(row, folder) for row in SCENARIOS}
    torch.save(outcomes, folder / f"rank{RANK}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
