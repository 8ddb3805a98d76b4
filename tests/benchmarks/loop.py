"""The cost of the loop, in ratios of one run.

``python -m tests.benchmarks.loop [ROUNDS]``: the contestants take turns, and each figure is
the median over the rounds. SpeechBrain is needed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support import environment  # noqa: F401  First: it makes SpeechBrain importable.

# isort: split
import speechbrain
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import brain_lightning
from brain_lightning import to_lightning

CLIP = 5.0


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        width: Of the square layers: 10 costs nothing but the loop.
        modules: How many layers, each an entry of ``modules``.
        optimizers: How many take turns in owning the layers.
        accumulation: Batches for one update.
        steps: Batches of the one epoch.
    """

    width: int = 10
    modules: int = 1
    optimizers: int = 1
    accumulation: int = 1
    steps: int = 1000

    def layers(self) -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return {f"m{i}": nn.Linear(self.width, self.width) for i in range(self.modules)}

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(4 * self.steps, self.width)), 4)

    def make_optimizers(
        self, layers: dict[str, nn.Module]
    ) -> dict[str, torch.optim.Optimizer]:
        groups = [list(layers.values())[i :: self.optimizers] for i in range(self.optimizers)]
        return {
            f"o{i}": torch.optim.SGD([p for layer in group for p in layer.parameters()], 0.01)
            for i, group in enumerate(groups)
        }


def forward(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def plain(work: Work, bar: bool) -> None:
    """PyTorch alone: clipping, a finite check, a running loss."""
    layers = work.layers()
    optimizers = work.make_optimizers(layers)
    average = 0.0
    for step, (x,) in enumerate(work.loader(), 1):
        loss = forward(layers.values(), x).square().mean()
        if torch.isfinite(loss):
            (loss / work.accumulation).backward()
        if step % work.accumulation == 0:
            for optimizer in optimizers.values():
                parameters = optimizer.param_groups[0]["params"]
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()
        average += (float(loss.detach()) - average) / step


def brain_class(base: Any, by_hand: bool = False) -> Any:
    class Square(base):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return forward(self.modules.values(), batch[0])

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return predictions.square().mean()

        def init_optimizers(self) -> None:
            self.optimizers_dict = self.hparams.work.make_optimizers(self.modules)

    class ByHand(Square):
        def fit_batch(self, batch: Any) -> Any:
            return super().fit_batch(batch)

    return ByHand if by_hand else Square


def brain(base: Any, work: Work, by_hand: bool = False) -> Any:
    run_opts = {
        "device": "cpu", "max_grad_norm": CLIP, "ckpt_interval_minutes": 0,
        "grad_accumulation_factor": work.accumulation,
    }  # fmt: skip
    # A bar also where no terminal is, as SpeechBrain's.
    hparams = {"work": work, "progress": "bar"}
    return brain_class(base, by_hand)(work.layers(), None, hparams, run_opts)


def fit_of(base: Any, by_hand: bool = False) -> Callable[[Work, bool], None]:
    def fit(work: Work, bar: bool) -> None:
        brain(base, work, by_hand).fit(range(1), work.loader(), progressbar=bar)

    return fit


def brain_with_log(work: Work, bar: bool) -> None:
    trainer = {"logger": CSVLogger("/tmp/brain_lightning_benchmark")}  # noqa: S108
    brain(brain_lightning.Brain, work).fit(
        range(1), work.loader(), progressbar=bar, trainer=trainer
    )


def bare_trainer(**kwargs: Any) -> Trainer:
    arguments = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**arguments, **kwargs})


def module_of_a_brain(work: Work, bar: bool) -> None:
    trainer = bare_trainer(**_bar(bar))
    trainer.fit(to_lightning(brain(brain_lightning.Brain, work)), work.loader())


def _bar(bar: bool) -> dict[str, Any]:
    return {"enable_progress_bar": True, "callbacks": [TQDMProgressBar()]} if bar else {}


class Handwritten(LightningModule):
    """The same work as one writes it for Lightning."""

    def __init__(self, work: Work, logs: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(work.layers())
        self.work, self.logs = work, logs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = forward(self.layers.values(), batch[0]).square().mean()
        if self.logs:
            if not torch.isfinite(loss):
                return None
            self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def handwritten(work: Work, bar: bool) -> None:
    logger = CSVLogger("/tmp/brain_lightning_benchmark")  # noqa: S108
    trainer = bare_trainer(logger=logger, gradient_clip_val=CLIP, **_bar(bar))
    trainer.fit(Handwritten(work, logs=True), work.loader())


def bare_module(work: Work, bar: bool) -> None:
    bare_trainer(**_bar(bar)).fit(Handwritten(work, logs=False), work.loader())


CONTESTANTS: dict[str, Callable[[Work, bool], None]] = {
    "PyTorch": plain,
    "SpeechBrain": fit_of(speechbrain.Brain),
    "brain.fit": fit_of(brain_lightning.Brain),
    "brain.fit, fit_batch overridden": fit_of(brain_lightning.Brain, by_hand=True),
    "brain.fit, with CSVLogger": brain_with_log,
    "to_lightning, bare Trainer": module_of_a_brain,
    "LightningModule, nothing logged": bare_module,
    "LightningModule, the same work": handwritten,
}


def microseconds(contestant: Callable[[Work, bool], None], work: Work, bar: bool) -> float:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        contestant(work, bar)
        return (time.perf_counter() - started) / work.steps * 1e6


def table(
    work: Work, rounds: int, names: list[str], bars: tuple[bool, ...] = (False, True)
) -> dict[tuple[str, bool], float]:
    """The median of each contestant, which take turns."""
    cells = [(name, bar) for name in names for bar in bars]
    times: dict[tuple[str, bool], list[float]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for name, bar in cells:
            times[name, bar].append(microseconds(CONTESTANTS[name], work, bar))
    return {cell: statistics.median(found) for cell, found in times.items()}


def show(work: Work, rounds: int, names: list[str]) -> None:
    found = table(work, rounds, names)
    base = found["SpeechBrain", False]
    print(f"\n{work}\n{'':<34}{'us a step':>10}{'ratio':>7}{'with bar':>10}{'ratio':>7}")
    for name in names:
        without, with_bar = found[name, False], found[name, True]
        ratios = without / base, with_bar / found["SpeechBrain", True]
        row = f"{without:>10.0f}{ratios[0]:>7.2f}{with_bar:>10.0f}{ratios[1]:>7.2f}"
        print(f"{name:<34}{row}", flush=True)


def main(rounds: int) -> None:
    quiet()
    show(Work(), rounds, list(CONTESTANTS))
    some = ["PyTorch", "SpeechBrain", "brain.fit", "brain.fit, fit_batch overridden"]
    show(Work(modules=20), rounds, some)
    show(Work(modules=4, optimizers=4), rounds, some)
    show(Work(accumulation=8), rounds, some)
    show(Work(width=700, steps=300), rounds, some)
    show(Work(width=3300, steps=60), rounds, some)


def quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
