"""Runs one Brain with each way to shard it, in one process or in several processes.

Usage: ``python -m tests.fsdp2.runs FOLDER``, or the same with torchrun.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from brain_lightning import FSDP2Strategy, RunOptions, patch_speechbrain, to_lightning
from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.tensors import is_shard
from brain_lightning.protocol import BrainProtocol
from tests.support.brains import Regression, dataset, trainer_with
from tests.support.environment import import_speechbrain, seed_everything

IN_YAML = """
trainer:
    devices: {processes}
    strategy: !new:brain_lightning.FSDP2Strategy
        blocks: [Layer]
        cpu_offload: True
"""
# Number of floats in one entry of the Brain whose memory is measured.
ENTRY = 2**16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def model() -> nn.Module:
    return nn.Sequential(Layer(), Layer(), nn.Linear(4, 2))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def make(cls: Any = Regression, hparams: Any = None, **run_opts: Any) -> Any:
    torch.manual_seed(0)
    return cls({"model": model()}, adamw, hparams or {}, {**RUN_OPTS, **run_opts})


RUN_OPTS = {"device": "cpu", "noprogressbar": True}


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def result(brain: BrainProtocol, trainer: Any = None, evaluated: Any = None) -> Any:
    """Fits and evaluates. Returns weights, losses, and whether weights were sharded."""
    losses: list[Any] = []

    def end(stage: Any, loss: float, epoch: Any = None) -> None:
        losses.append((stage.name, epoch, loss))

    vars(brain)["on_stage_end"] = end
    kwargs = {"batch_size": 4}
    train: Any = dataset()
    # With two ranks, items alternate between the ranks.
    brain.hparams.sorting = "ascending"
    if isinstance(trainer, Trainer):
        own = range(int(os.environ.get("RANK", 0)), len(train), processes())
        train = DataLoader(Subset(train, own), **kwargs)
    valid = DataLoader(dataset(8), **kwargs)
    if isinstance(trainer, Trainer):
        trainer.fit(to_lightning(brain, epoch_counter=range(2)), train, valid)
    else:
        brain.fit(range(2), train, valid, trainer=trainer, train_loader_kwargs=kwargs)
    was_sharded = any(is_shard(p) for p in brain.modules.parameters())
    brain.evaluate(dataset(8), test_loader_kwargs=kwargs, trainer=evaluated)
    weights = brain.modules.state_dict()
    # Rank 0 has full tensors of all weights.
    own = {n.replace(".module.", "."): w for n, w in weights.items() if not is_shard(w)}
    return own, losses, was_sharded


def fsdp2(**options: Any) -> dict[str, Any]:
    return {"strategy": FSDP2Strategy(**options), "devices": processes()}


def plain() -> Any:
    several = {"strategy": "ddp", "devices": 2} if processes() > 1 else {}
    return result(make(hparams={"trainer": several}))


def by_call() -> Any:
    trainer = {"strategy": "fsdp2", "devices": processes()}
    return result(make(), trainer, trainer)


def by_hparams() -> Any:
    return result(make(hparams=load_hyperpyyaml(IN_YAML.format(processes=processes()))))


def by_command_line() -> Any:
    """Without ``devices``, because torchrun sets the number of processes."""
    run_opts = RunOptions.from_dictionary({**RUN_OPTS, "trainer": {"strategy": "fsdp2"}})
    torch.manual_seed(0)
    given = {"trainer": {"strategy": "ddp", "enable_model_summary": False}}
    return result(Regression({"model": model()}, adamw, given, run_opts))


def by_trainer_object() -> Any:
    arguments = {"devices": processes(), "use_distributed_sampler": False}
    return result(make(), trainer_with(strategy="fsdp2", **arguments))


def in_copies() -> Any:
    """Each rank has a full copy of the model."""
    return result(make(hparams={"trainer": fsdp2(replicate=processes())}))


def not_gathered() -> Any:
    return result(make(hparams={"trainer": fsdp2(gather_to_evaluate=False)}))


def twice_with_one_strategy() -> Any:
    given = {"trainer": fsdp2()}
    result(make(hparams=given))
    return result(make(hparams=given))


def on_the_meta_device() -> Any:
    with torch.device("meta"):
        modules = {"model": model()}
    brain = Regression(modules, adamw, {"trainer": fsdp2()}, RUN_OPTS)
    # The ranks have different seeds, and the weights of rank 0 are used.
    torch.manual_seed(0 if os.environ.get("RANK", "0") == "0" else 9)
    return result(brain)


def by_speechbrain() -> Any:
    import_speechbrain()
    from speechbrain.core import Brain

    class Patched(Brain):
        compute_forward = Regression.compute_forward
        compute_objectives = Regression.compute_objectives

    with patch_speechbrain():
        return result(make(Patched, {"trainer": fsdp2()}))


def tested(**options: Any) -> tuple[Any, list[bool]]:
    """Tests without training. Also returns whether weights were sharded in each batch."""
    brain, sharded = make(hparams={"trainer": fsdp2(**options)}), list[bool]()

    def compute_forward(batch: Any, stage: Any) -> Any:
        sharded.append(any(is_shard(p) for p in brain.modules.parameters()))
        return type(brain).compute_forward(brain, batch, stage)

    vars(brain)["compute_forward"] = compute_forward
    return brain.evaluate(dataset(8), test_loader_kwargs={"batch_size": 4}), sharded


def only_tested() -> Any:
    by_hand = make().evaluate(dataset(8), test_loader_kwargs={"batch_size": 4})
    return by_hand, tested(), tested(gather_to_evaluate=False)


def predicted() -> list[Tensor]:
    """Predicts five batches with FSDP2 and DDP. Of two ranks, rank 0 has one batch more."""
    predictions: list[Tensor] = []
    for strategy in ("fsdp2", "ddp"):
        trainer = trainer_with(strategy=strategy, devices=processes())
        found = trainer.predict(to_lightning(make()), DataLoader(dataset(5), batch_size=1))
        predictions.append(torch.cat(found or []))
    return predictions


def not_wrapped() -> str:
    """Returns the error of a Brain that does not shard its modules."""
    brain = make(hparams={"trainer": fsdp2()})
    vars(brain)["on_fit_start"] = lambda: brain.init_optimizers()
    try:
        brain.fit(range(1), dataset())
    except UnsupportedError as error:
        return str(error)
    return ""


class Wide(nn.Module):
    """An entry with one weight. It records how many entries are sharded when it is moved."""

    def __init__(self, sharded: Callable[[], int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ENTRY // 4, 4))
        self.moves: list[int] = []
        self.sharded = sharded

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.moves.append(self.sharded())
        return super()._apply(*args, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight[:2].t()


def wide(device: str) -> tuple[dict[str, Wide], Any]:
    """Returns four entries, and a Brain with these entries."""
    entries: dict[str, Wide] = {}

    def sharded() -> int:
        return sum(is_shard(entry.weight) for entry in entries.values())

    with torch.device(device):
        entries.update({name: Wide(sharded) for name in "abcd"})
    return entries, Regression(dict(entries), adamw, {"trainer": fsdp2()}, RUN_OPTS)


def one_by_one(device: str) -> list[list[int]]:
    """Returns how many entries were sharded when each of four entries was moved."""
    entries, brain = wide(device)
    vars(brain)["compute_forward"] = lambda batch, _: brain.modules.a(batch[0])
    brain.fit(range(1), dataset(4))
    return [entry.moves for entry in entries.values()]


def from_the_cpu() -> Any:
    return one_by_one("cpu")


def from_the_meta_device() -> Any:
    return one_by_one("meta")


RUNS: tuple[Callable[[], Any], ...] = (
    plain, by_call, by_hparams, by_command_line, by_trainer_object, in_copies, not_gathered,
    twice_with_one_strategy, on_the_meta_device, by_speechbrain,
)  # fmt: skip
OTHERS: tuple[Callable[[], Any], ...] = (
    only_tested, predicted, not_wrapped, from_the_cpu, from_the_meta_device,
)  # fmt: skip


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if processes() > 1:
        timeout = datetime.timedelta(seconds=90)
        torch.distributed.init_process_group("gloo", timeout=timeout)
    found: dict[str, Any] = {}
    for run in (*RUNS, *OTHERS):
        seed_everything(1)
        found[run.__name__] = run()
    torch.save(found, Path(folder) / f"{processes()}-{os.environ.get('RANK', 0)}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
