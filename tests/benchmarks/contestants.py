"""Who takes part, and what there is to do: the same work for each."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import brain_lightning
from brain_lightning import to_lightning

from .measure import Meter, Probe

# A machine with a GPU may have no more than the package needs.
with contextlib.suppress(ImportError, OSError):
    # It makes SpeechBrain importable, and imports it.
    from tests.support import environment  # noqa: F401
speechbrain: Any = sys.modules.get("speechbrain")

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
        valid_steps: Batches of the validation behind it.
        device: Where.
        precision: SpeechBrain's name of it.
        run_opts: More of a Brain's.
        checkpointer: Makes a Brain's checkpointer, for a kind of Brain.
        meter: Measures some of the steps.
    """

    width: int = 10
    modules: int = 1
    optimizers: int = 1
    accumulation: int = 1
    steps: int = 1000
    valid_steps: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    run_opts: Mapping[str, Any] = field(default_factory=dict)
    checkpointer: Callable[[Any, dict[str, nn.Module]], Any] | None = None
    meter: Meter | None = None

    def __str__(self) -> str:
        layers = f"{self.modules} Linear({self.width}, {self.width})"
        more = {"optimizers": self.optimizers, "batches an update": self.accumulation}
        return ", ".join([layers, *(f"{n} {what}" for what, n in more.items() if n > 1)])

    def layers(self) -> dict[str, nn.Module]:
        """The entries of ``modules``, on the device."""
        torch.manual_seed(0)
        layers = {name: layer.to(self.device) for name, layer in self.make_layers().items()}
        if self.meter is not None:
            self.meter.watch(next(iter(layers.values())))
        return layers

    def make_layers(self) -> dict[str, nn.Module]:
        return {f"m{i}": nn.Linear(self.width, self.width) for i in range(self.modules)}

    def loader(self) -> DataLoader[Any]:
        return self.batches(self.steps)

    def valid_loader(self) -> DataLoader[Any] | None:
        return self.batches(self.valid_steps) if self.valid_steps else None

    def batches(self, steps: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(4 * steps, self.width)), 4)

    def make_optimizers(self, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
        groups = [list(layers.values())[i :: self.optimizers] for i in range(self.optimizers)]
        return {
            f"o{i}": self.make_optimizer([p for layer in group for p in layer.parameters()])
            for i, group in enumerate(groups)
        }

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.01)

    def measured(self, steps: int, *probes: Probe, warm: int = 5, valid: bool = False) -> Work:
        """The same with a meter, and just the batches that it needs."""
        meter = Meter(steps, *probes, warm=warm, training=not valid)
        if valid:
            return replace(self, steps=1, valid_steps=meter.batches, meter=meter)
        return replace(self, steps=meter.batches, meter=meter)


Contestant = Callable[[Work, bool], None]


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
        "device": work.device, "precision": work.precision, "eval_precision": work.precision,
        "max_grad_norm": CLIP, "ckpt_interval_minutes": 0,
        "grad_accumulation_factor": work.accumulation, **work.run_opts,
    }  # fmt: skip
    # A bar also where no terminal is, as SpeechBrain's.
    hparams = {"work": work, "progress": "bar"}
    layers = work.layers()
    checkpointer = work.checkpointer and work.checkpointer(base, layers)
    return brain_class(base, by_hand)(layers, None, hparams, run_opts, checkpointer)


def fit_of(base: Any, by_hand: bool = False) -> Contestant:
    def fit(work: Work, bar: bool) -> None:
        loaders = work.loader(), work.valid_loader()
        brain(base, work, by_hand).fit(range(1), *loaders, progressbar=bar)

    return fit


def brain_with_log(work: Work, bar: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"logger": CSVLogger(folder)}
        brain(brain_lightning.Brain, work).fit(
            range(1), work.loader(), progressbar=bar, trainer=trainer
        )


def bare_trainer(work: Work, bar: bool, **kwargs: Any) -> Trainer:
    callbacks = [TQDMProgressBar()] if bar else []
    arguments = {
        "accelerator": "cpu" if work.device == "cpu" else "gpu", "devices": 1,
        "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[work.precision],
        "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": bar, "callbacks": callbacks, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**arguments, **kwargs})


def module_of_a_brain(work: Work, bar: bool) -> None:
    module = to_lightning(brain(brain_lightning.Brain, work))
    bare_trainer(work, bar).fit(module, work.loader())


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
        return self.work.make_optimizer(list(self.parameters()))


def handwritten(work: Work, bar: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = bare_trainer(work, bar, logger=CSVLogger(folder), gradient_clip_val=CLIP)
        trainer.fit(Handwritten(work, logs=True), work.loader())


def bare_module(work: Work, bar: bool) -> None:
    bare_trainer(work, bar).fit(Handwritten(work, logs=False), work.loader())


CONTESTANTS: dict[str, Contestant] = {
    "PyTorch": plain,
    **({} if speechbrain is None else {"SpeechBrain": fit_of(speechbrain.Brain)}),
    "brain.fit": fit_of(brain_lightning.Brain),
    "brain.fit, fit_batch overridden": fit_of(brain_lightning.Brain, by_hand=True),
    "brain.fit, with CSVLogger": brain_with_log,
    "to_lightning, bare Trainer": module_of_a_brain,
    "LightningModule, nothing logged": bare_module,
    "LightningModule, the same work": handwritten,
}
