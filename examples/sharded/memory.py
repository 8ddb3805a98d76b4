"""What each of two processes holds of a model: all of it in DDP, a half of it in shards.

Run it as ``python memory.py hparams.yaml [--overrides]``; it starts the second process. The
recipe is that of ``examples/ctc_digits``, and nothing in it says how it is trained.
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
    """Measures what it holds before each step of an optimizer, when there are gradients.

    Attributes:
        held: The most bytes of weights, gradients and optimizer states so far.
    """

    held = 0

    def init_optimizers(self) -> None:
        """Makes the recipe's optimizers."""
        super().init_optimizers()
        for optimizer in self.optimizers_dict.values():
            optimizer.register_step_pre_hook(self.measure)

    def measure(self, *_: Any) -> None:
        """Counts bytes; called by the optimizers."""
        self.held = max(self.held, sum(map(local_bytes, self.tensors())))

    def tensors(self) -> Iterator[Tensor]:
        """Weights, gradients and optimizer states."""
        for parameter in self.modules.parameters():
            yield from (each for each in (parameter, parameter.grad) if each is not None)
        for optimizer in self.optimizers_dict.values():
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def local_bytes(tensor: Tensor) -> int:
    """The memory of a tensor in this process.

    Args:
        tensor: A whole one, or one in shards.
    """
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def train(hparams: dict[str, Any], run_opts: RunOptions, strategy: str) -> list[int]:
    """Trains the recipe in two processes.

    Args:
        hparams: Those of ``examples/ctc_digits``.
        run_opts: Options of the command line.
        strategy: Of the Trainer.

    Returns:
        The bytes that each process has held.
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
    """Trains in DDP and in shards, and prints what each process held.

    Args:
        arguments: The words of the command line; ``sys.argv[1:]`` if not given.
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
