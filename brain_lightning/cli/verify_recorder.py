"""One side of ``verify``: runs a recipe and records what its Brains did.

Each side is a process, ``python -m brain_lightning.cli.verify_recorder``, so that neither
finds what the other one left behind.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from brain_lightning.brain.brain import Brain
from brain_lightning.brain.patch import patch_speechbrain
from brain_lightning.protocol import parameters_of

from .script import run_recipe, run_script

# Every hook of a Brain that its loops call, except fit_batch and optimizers_step: a Brain
# that overrides them does its own stepping.
HOOKS = (
    "make_dataloader", "on_fit_start", "init_optimizers", "on_stage_start",
    "on_fit_batch_start", "compute_forward", "compute_objectives", "check_loss_isfinite",
    "freeze_optimizers", "check_gradients", "on_fit_batch_end", "evaluate_batch", "zero_grad",
    "on_stage_end", "on_evaluate_start",
)  # fmt: skip
# Parts of a Brain that are loops: a recipe that overrides one runs its own code there.
LOOPS = ("fit", "_fit_train", "_fit_valid", "evaluate")
SEED = 1234


class TrainerWitness(Callback):
    """Counts what Trainers run, so that nothing is taken for theirs that is not.

    Attributes:
        batches: Training batches of each class of Brain.
        others: Batches of validations and tests of each.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a training batch of a Trainer."""
        self.batches[type(pl_module.brain).__name__] += 1

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a test batch of a Trainer."""
        self.others[type(pl_module.brain).__name__] += 1

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a validation batch of a Trainer."""
        self.on_test_batch_end(trainer, pl_module)


class Recorder:
    """Records the events of all Brains, in their order.

    Args:
        steps: Training batches after which a Brain ends its epoch and its training;
            0 for all of them.

    Attributes:
        events: What happened, each as a dict with its ``kind`` and when it was.
        trained: Objectives of training and updates of each class of Brain.
        tested: Objectives of validations and tests of each.
        loops: Loops that each class of Brain overrides, as ``Own.fit``.
    """

    def __init__(self, steps: int) -> None:
        self.events: list[dict[str, Any]] = []
        self.trained: Counter[str] = Counter()
        self.tested: Counter[str] = Counter()
        self.loops: dict[str, list[str]] = {}
        self._base: Any = object
        self._steps = steps
        self._done: Counter[int] = Counter()
        self._brains: list[Any] = []
        # A recipe may fit within a stage.
        self._stages: list[tuple[str, Any]] = []

    def watch(self, brain_class: Any) -> None:
        """Attaches to every Brain that is made after this call, and to every optimizer.

        Args:
            brain_class: ``speechbrain.core.Brain``.
        """
        self._base, make = brain_class, brain_class.__init__

        @functools.wraps(make)
        def __init__(brain: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            make(brain, *args, **kwargs)
            self.attach(brain)

        brain_class.__init__ = __init__
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def attach(self, brain: Any) -> None:
        """Records the hooks of one Brain; its class stays as it is.

        Args:
            brain: The Brain.
        """
        self._brains.append(brain)
        classes = type(brain).__mro__
        own = {name: cls.__name__ for cls in reversed(classes[: classes.index(self._base)])
               for name in LOOPS if name in vars(cls)}  # fmt: skip
        self.loops[type(brain).__name__] = [f"{cls}.{name}" for name, cls in own.items()]
        for name in HOOKS:
            setattr(brain, name, self._recorded(brain, name, getattr(brain, name)))
        brain.update_average = self._counted(brain, brain.update_average)

    def add(self, kind: str, **details: Any) -> None:
        """Records one event.

        Args:
            kind: hook, objective, gradients, weights, loss, stage or error.
            **details: What it is about.
        """
        step = max((brain.step for brain in self._brains), default=0)
        stage, epoch = self._stages[-1] if self._stages else ("", None)
        when = {"stage": stage, "epoch": epoch, "step": step}
        self.events.append({"kind": kind, **when, **details})

    def _recorded(self, brain: Any, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            stages = [a.name for a in (*args, *kwargs.values()) if type(a).__name__ == "Stage"]
            if name == "on_stage_start":
                epoch = _plain(kwargs.get("epoch", (*args, None, None)[1]))
                self._stages.append((stages[0], epoch))
            self.add("hook", hook=f"{name}({', '.join(stages)})" if stages else name)
            if name == "on_stage_end":
                loss = kwargs.get("stage_loss", (*args, None)[1])
                weights = _digests(brain.modules.state_dict().items())
                self.add("stage", loss=_number(loss), weights=weights)
            result = hook(*args, **kwargs)
            if name == "on_stage_end" and self._stages:
                self._stages.pop()
            if name == "compute_objectives":
                counts = self.trained if stages == ["TRAIN"] else self.tested
                counts[type(brain).__name__] += 1
                # Before the gradients: what differs first is named.
                self.add("objective", loss=_number(result))
            return result

        return recorded

    def _counted(self, brain: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def counted(loss: Any, avg_loss: Any) -> Any:
            self.add("loss", loss=_number(loss))
            if self._stages and self._stages[-1][0] == "TRAIN":
                self._done[id(brain)] += 1
                if self._done[id(brain)] == self._steps:
                    # Both sides end the epoch, and the training, after the same batch.
                    brain.debug, brain.debug_batches = True, brain.step
                    brain.debug_epochs = self._stages[-1][1]
            return hook(loss, avg_loss)

        return counted

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Records what an optimizer is about to apply.

        Args:
            optimizer: The optimizer.
        """
        gradients = {n: p.grad for n, p in self._named(optimizer) if p.grad is not None}
        norms = [torch.linalg.vector_norm(g.detach()).item() for g in gradients.values()]
        norm = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64))
        self.add(
            "gradients",
            optimizer=type(optimizer).__name__,
            rates=[_number(group["lr"]) for group in optimizer.param_groups],
            norm=_number(norm),
            tensors=_digests(gradients.items()),
        )

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Records what an optimizer has changed.

        Args:
            optimizer: The optimizer.
        """
        self.add("weights", tensors=_digests(self._named(optimizer)))
        changed = {id(parameter) for parameter in parameters_of(optimizer)}
        for brain in self._brains:
            owns = any(id(parameter) in changed for parameter in brain.modules.parameters())
            self.trained[type(brain).__name__] += owns

    def _named(self, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        names = {
            id(parameter): name
            for brain in self._brains
            for name, parameter in brain.modules.named_parameters()
        }
        return [
            (names.get(id(parameter), f"parameter {index}"), parameter)
            for index, parameter in enumerate(parameters_of(optimizer))
        ]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _number(value: Any) -> str:
    """Every digit; as text, since JSON has no NaN and a recipe may return anything."""
    try:
        return repr(float(value))
    except (TypeError, ValueError, RuntimeError):
        return type(value).__name__


def _digests(named: Iterable[tuple[str, Any]]) -> dict[str, int]:
    return {name: _digest(tensor) for name, tensor in named if isinstance(tensor, Tensor)}


def _digest(tensor: Tensor) -> int:
    if is_lazy(tensor):
        return 0
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes())


def seed_everything() -> None:
    """Gives both sides the same random numbers, and the same kernels."""
    random.seed(SEED)
    importlib.import_module("numpy").random.seed(SEED)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)


def record(
    side: str, script: str, words: list[str], steps: int, trainer: Any
) -> dict[str, Any]:
    """Runs a recipe and records what it does.

    Args:
        side: ``speechbrain`` or ``trainer``: whose loops run; ``ported``: on our Brain.
        script: The script.
        words: Its command line.
        steps: See ``Recorder``.
        trainer: Arguments of the Trainer.

    Returns:
        The ``events``, of which an error of the recipe is the last; and by class of Brain what
        was ``trained`` and ``tested``, how many batches of both were ``on_trainer`` and
        ``others``, and the recipe's own ``loops``.
    """
    seed_everything()
    recorder, witness = Recorder(steps), TrainerWitness()
    theirs = importlib.import_module("speechbrain.core").Brain
    recorder.watch(Brain if side == "ported" else theirs)
    seed_everything()
    try:
        with patch_speechbrain(trainer, [witness]) if side == "trainer" else nullcontext():
            if side == "ported":
                run_recipe(script, words, trainer, [witness])
            else:
                run_script(script, words)
    except SystemExit as end:
        if end.code not in (None, 0):
            recorder.add("error", error=f"exit status {end.code}")
    except BaseException as error:  # noqa: BLE001  whatever the recipe raises
        traceback.print_exc()
        recorder.add("error", error=f"{type(error).__name__}: {error}")
    return {
        "events": recorder.events,
        "trained": recorder.trained,
        "tested": recorder.tested,
        "on_trainer": witness.batches,
        "others": witness.others,
        "loops": recorder.loops,
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    out = Path(arguments.pop("out"))
    out.write_text(json.dumps(record(**arguments)), encoding="utf-8")
