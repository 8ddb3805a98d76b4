"""What works with each Brain of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from brain_lightning.brain.brain import Brain
from brain_lightning.callback.unsupported import REFUSED_CALLBACKS
from brain_lightning.protocol import MANUAL_HOOKS

from .source import BrainSource, Location, RecipeSource

HOOKS = frozenset(
    name for name in dir(Brain) if callable(getattr(Brain, name)) and not name.startswith("__")
)
# Attributes of SpeechBrain's Brain whose use shows how a recipe steps.
STEPPING = ("scaler", "training_ctx", "no_sync", "optimizers_step", "check_gradients", "fit")
CALLS = ("backward", "clip_grad_norm_")
PARALLEL = "ddp (each entry of modules in its own DistributedDataParallel)"
BACKBONE = "BackboneFinetuning unless init_optimizers leaves the backbone out"
# Attributes of every Module, which are no entries.
OF_A_MODULE = frozenset(dir(torch.nn.ModuleDict))
ARGUMENTS = (
    "accelerator", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run",
    "max_epochs", "min_epochs", "max_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "limit_test_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "log_every_n_steps", "enable_checkpointing",
    "enable_progress_bar", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark", "profiler", "detect_anomaly",
    "barebones", "reload_dataloaders_every_n_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class Remark:
    """What does not work, and what to change.

    Attributes:
        about: A Trainer argument, a strategy or a hook.
        says: What happens, and what would make it work.
        line: Where to change it.
    """

    about: str
    says: str
    line: int


@dataclass(frozen=True)
class BrainReport:
    """What works with one Brain of a recipe.

    Attributes:
        name: Its class.
        line: Where it begins.
        base: What it is a Brain of.
        overrides: Its hooks, and where they are.
        updates: ``automatic`` or ``manual``.
        why: Why so.
        uses: What else it touches of a Brain, and on which lines.
        strategies: Those that run it.
        arguments: Arguments of the Trainer that work as Lightning documents them.
        remarks: What does not work.
        callbacks_refused: Lightning's callbacks that it cannot have.
    """

    name: str
    line: int
    base: str
    overrides: dict[str, str]
    updates: str
    why: str
    uses: dict[str, list[str]]
    strategies: list[str]
    arguments: list[str]
    remarks: list[Remark]
    callbacks_refused: list[str]


@dataclass(frozen=True)
class Report:
    """What works with a recipe.

    Attributes:
        script: The script.
        brains: One report for each Brain in it.
    """

    script: str
    brains: list[BrainReport]


def examine(script: str) -> Report:
    """Reads a script, and the files beside it that its Brains come from.

    Args:
        script: The script.

    Returns:
        What works with it.

    Raises:
        RecipeError: It cannot be read, or is no Python.
    """
    source = RecipeSource(script)
    return Report(script, [_examine(brain, source) for brain in source.brains])


def _examine(brain: BrainSource, source: RecipeSource) -> BrainReport:
    overrides = {name: str(at) for name, at in brain.methods.items() if name in HOOKS}
    manual = [hook for hook in MANUAL_HOOKS if hook in overrides]
    why = [f"{hook} is overridden ({overrides[hook]})" for hook in manual]
    refused = [callback.__name__ for callback in REFUSED_CALLBACKS]
    refused += ["StochasticWeightAveraging with BatchNorm", BACKBONE]
    remarks = [*_loop_remarks(brain), *_process_remarks(brain, source)]
    remarks += _manual_remarks(brain) if manual else []
    limited = {remark.about for remark in remarks}
    return BrainReport(
        name=brain.name,
        line=brain.location.line,
        base=brain.base,
        overrides=overrides,
        updates="manual" if manual else "automatic",
        why=" and ".join(why) or "neither fit_batch nor optimizers_step is overridden",
        uses={name: [str(at) for at in sorted({*lines})] for name, lines in _uses(brain)},
        strategies=["one device"] + ([] if "strategy=ddp" in limited else [PARALLEL]),
        arguments=[name for name in ARGUMENTS if name not in limited],
        remarks=remarks,
        callbacks_refused=refused + (["GradientAccumulationScheduler"] if manual else []),
    )


def _uses(brain: BrainSource) -> Iterator[tuple[str, list[Location]]]:
    yield from ((f"self.{n}", brain.reads[n]) for n in STEPPING if n in brain.reads)
    for owner, found in (("self", brain.reads), ("super()", brain.supers)):
        private = [name for name in found if name in HOOKS and name.startswith("_")]
        yield from ((f"{owner}.{name} (private)", found[name]) for name in private)
    if brain.unwraps:
        yield ".module", brain.unwraps
    yield from ((f"{n}()", brain.calls[n]) for n in CALLS if n in brain.calls)


def _loop_remarks(brain: BrainSource) -> Iterator[Remark]:
    if "fit" in brain.reads:
        says = "a fit within a fit gets device, strategy and precision of the outer Trainer, "
        says += "not its limits and callbacks"
        yield Remark("fit", says, brain.reads["fit"][0].line)
    if "_fit_train" in brain.methods:
        says = "refused before training: the Trainer replaces it; use a hook or a callback"
        yield Remark("_fit_train", says, brain.methods["_fit_train"].line)


def _process_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    wraps = "on_fit_start" in brain.supers or "_wrap_distributed" in brain.reads
    if "on_fit_start" in brain.methods and not wraps:
        says = "gradients would not be averaged: call self._wrap_distributed() in on_fit_start"
        yield Remark("strategy=ddp", says, brain.methods["on_fit_start"].line)
    if brain.hparams_called and not brain.entries - OF_A_MODULE:
        name, location = next(iter(brain.hparams_called.items()))
        says = (
            f"gradients would not be averaged if hparams.{name} is one of modules: call "
            f"self.modules.{name}, for what is called in hparams has no wrapper"
        )
        yield Remark("strategy=ddp", says, location.line)
    group = next((p for n, p in source.called.items() if n.endswith("ddp_init_group")), None)
    speechbrains = brain.base.startswith("SpeechBrain")
    if group is not None and not speechbrains:
        says = (
            "python train.py --trainer.devices=2 would wait for ever at SpeechBrain's "
            "ddp_init_group: leave it out, or start the processes by torchrun"
        )
        yield Remark("devices", says, group.line)
    if group is None and speechbrains:
        says = (
            "SpeechBrain's Brain wants sb.utils.distributed.ddp_init_group(run_opts) before "
            "it is made"
        )
        made = source.called.get(brain.name, brain.location)
        yield Remark("devices", says, made.line)


def _manual_remarks(brain: BrainSource) -> Iterator[Remark]:
    """Options that a recipe's own step has to apply itself."""
    line = next(brain.methods[hook].line for hook in MANUAL_HOOKS if hook in brain.methods)
    own_fit_batch = "fit_batch" in brain.methods and "fit_batch" not in brain.supers
    steps = "optimizers_step" in brain.reads and "optimizers_step" not in brain.methods
    if brain.base.startswith("SpeechBrain"):
        says = "'value' is refused: SpeechBrain's own steps clip norms alone"
        yield Remark("gradient_clip_algorithm", says, line)
    elif own_fit_batch and not steps:
        says = "has no effect: step by self.optimizers_step()"
        yield Remark("gradient_clip_algorithm", says, line)
    if own_fit_batch:
        yield from _fit_batch_remarks(brain, steps, line)


def _fit_batch_remarks(brain: BrainSource, steps: bool, line: int) -> Iterator[Remark]:
    known = set(brain.reads)
    if not steps and "max_grad_norm" not in known:
        says = "has no effect: clip to self.max_grad_norm, or step by self.optimizers_step()"
        yield Remark("gradient_clip_val", says, line)
    says = "an incomplete last window makes no update, as in SpeechBrain"
    if "grad_accumulation_factor" not in known:
        says = "has no effect: step when self.step % self.grad_accumulation_factor == 0"
    yield Remark("accumulate_grad_batches", says, line)
    if not ({"training_ctx", "precision"} & known or "autocast" in brain.calls):
        says = "mixed precision has no effect: compute the loss within self.training_ctx"
        yield Remark("precision", says, line)
    elif "scaler" not in known:
        says = "16-mixed loses small gradients: scale the loss by self.scaler"
        yield Remark("precision", says, line)
