"""Measures the memory of a model in two processes, with DDP and with FSDP2.

Run it as ``python memory.py hparams.yaml [--overrides]``; Lightning starts the second process.
The recipe is ``examples/ctc_digits``. It contains no code for distributed training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from brain_lightning import RunOptions, parse_arguments
from brain_lightning.distributed import if_main_process

sys.path.append(str(Path(__file__).resolve().parents[1] / "ctc_digits"))
from train import CTCBrain

PROCESSES = 2


class MeasuredBrain(CTCBrain):
    """Measures the memory of this process before each optimizer step, when gradients exist.

    Attributes:
        held: Peak number of bytes of weights, gradients and optimizer states.
    """

    held = 0

    def init_optimizers(self) -> None:
        """Creates the optimizers of the recipe, with a hook that measures."""
        super().init_optimizers()
        for optimizer in self.optimizers_dict.values():
            optimizer.register_step_pre_hook(self.measure)

    def measure(self, *_: Any) -> None:
        """Updates ``held``; called by the optimizers."""
        self.held = max(self.held, sum(map(local_bytes, self.tensors())))

    def tensors(self) -> Iterator[Tensor]:
        """Yields weights, gradients and optimizer states."""
        for parameter in self.modules.parameters():
            yield from (each for each in (parameter, parameter.grad) if each is not None)
        for optimizer in self.optimizers_dict.values():
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def local_bytes(tensor: Tensor) -> int:
    """Returns the number of bytes that a tensor takes in this process.

    Args:
        tensor: A plain tensor, or a DTensor, of which this process holds one shard.
    """
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def train(hparams: dict[str, Any], run_opts: RunOptions, strategy: str) -> list[int]:
    """Trains the recipe in two processes.

    Args:
        hparams: Hyperparameters of ``examples/ctc_digits``.
        run_opts: Run options of the command line.
        strategy: Strategy of the Trainer, ``"ddp"`` or ``"fsdp2"``.

    Returns:
        ``held`` of each process, by rank.
    """
    brain = MeasuredBrain(modules=hparams["modules"], hparams=hparams, run_opts=run_opts)
    brain.fit(
        brain.hparams.epoch_counter,
        hparams["train_data"],
        hparams["valid_data"],
        train_loader_kwargs=hparams["train_loader_kwargs"],
        valid_loader_kwargs=hparams["test_loader_kwargs"],
        trainer={"strategy": strategy, "devices": PROCESSES},
    )
    held = [0] * PROCESSES
    distributed.all_gather_object(held, brain.held)
    return held


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with DDP and with FSDP2, and prints the memory of each process.

    Args:
        arguments: Command-line arguments; ``sys.argv[1:]`` by default.
    """
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    lines = []
    for strategy in ("ddp", "fsdp2"):
        with open(hparams_file, encoding="utf-8") as fin:
            hparams = load_hyperpyyaml(fin, overrides)["ctc_digits"]
        held = train(hparams, run_opts, strategy)
        each = ", ".join(f"rank {rank} {size / 2**20:.1f}" for rank, size in enumerate(held))
        lines.append(f"{strategy:<5}  MiB of weights, gradients and optimizer states: {each}")
    if if_main_process():
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
