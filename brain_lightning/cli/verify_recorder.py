"""Runs one side of ``verify``, and records the events of the recipe's Brains.

Each side is a separate process, ``python -m brain_lightning.cli.verify_recorder``, so that
neither side sees global state that the other side changed.
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
from brain_lightning.errors import RecipeError
from brain_lightning.protocol import parameters_of

from .script import run_recipe, run_script

# All hooks that a Brain's loops call, except fit_batch and optimizers_step: a Brain that
# overrides these has a custom training step.
HOOKS = (
    "make_dataloader", "on_fit_start", "init_optimizers", "on_stage_start",
    "on_fit_batch_start", "compute_forward", "compute_objectives", "check_loss_isfinite",
    "freeze_optimizers", "check_gradients", "on_fit_batch_end", "evaluate_batch", "zero_grad",
    "on_stage_end", "on_evaluate_start",
)  # fmt: skip
# Methods of a Brain that are loops. If a recipe overrides one, its code runs on both sides.
LOOPS = ("fit", "_fit_train", "_fit_valid", "evaluate")
SEED = 1234


class NoSpeechBrainLoopError(RecipeError):
    """A Brain of SpeechBrain's side is brain_lightning's, so its loops run on a Trainer."""


class TrainerWitness(Callback):
    """Counts the batches that Trainers run, as evidence that a Trainer ran the recipe.

    Attributes:
        batches: Number of training batches of each Brain class.
        others: Number of validation and test batches of each Brain class.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a training batch."""
        self.batches[type(pl_module.brain).__name__] += 1

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a test batch."""
        self.others[type(pl_module.brain).__name__] += 1

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Counts a validation batch."""
        self.on_test_batch_end(trainer, pl_module)


class Recorder:
    """Records the events of all Brains in order.

    Args:
        steps: Number of training batches after which a Brain ends its epoch and its
            training, 0 for all.

    Attributes:
        events: One dict per event, with its ``kind``, ``stage``, ``epoch`` and ``step``.
        trained: Number of training objectives and optimizer steps of each Brain class.
        tested: Number of validation and test objectives of each Brain class.
        loops: Loops that each Brain class overrides, for example ``MyBrain.fit``.
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
        # A stack, because a recipe may call fit within a stage.
        self._stages: list[tuple[str, Any]] = []

    def watch(self, brain_class: Any) -> None:
        """Attaches to every Brain that is created after this call, and to every optimizer.

        Args:
            brain_class: ``speechbrain.core.Brain`` or ``brain_lightning.Brain``.
        """
        self._base = brain_class
        _after_init(brain_class, self.attach)
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def attach(self, brain: Any) -> None:
        """Records the hooks of one Brain. Its class is not changed.

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
            kind: ``hook``, ``objective``, ``gradients``, ``weights``, ``loss``, ``stage`` or
                ``error``.
            **details: Values of the event.
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
                # Recorded before the gradients, so that the first difference is the cause.
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
                    # Ends the epoch and the training after the same batch on both sides.
                    brain.debug, brain.debug_batches = True, brain.step
                    brain.debug_epochs = self._stages[-1][1]
            return hook(loss, avg_loss)

        return counted

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Records the gradients and learning rates before an optimizer step.

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
        """Records the weights after an optimizer step.

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


def _after_init(brain_class: Any, call: Callable[[Any], None]) -> None:
    """Calls a function with every Brain of a class that is created after this call."""
    make = brain_class.__init__

    @functools.wraps(make)
    def __init__(brain: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        make(brain, *args, **kwargs)
        call(brain)

    brain_class.__init__ = __init__


def _without_loops(brain: Brain) -> None:
    """Makes the loops of a Brain raise an error, overridden loops too."""

    def loop(*_: Any, **__: Any) -> None:
        raise NoSpeechBrainLoopError(
            f"{type(brain).__name__} is a subclass of brain_lightning.Brain, so there is no "
            "SpeechBrain loop to compare with. Run brain-lightning verify on the original "
            "recipe, whose Brain is SpeechBrain's. To compare a recipe with its port, run "
            "brain-lightning port --verify on the original recipe."
        )

    for name in LOOPS:
        setattr(brain, name, loop)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _number(value: Any) -> str:
    """Returns all digits as a string: JSON has no NaN, and a recipe may return any object."""
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
    """Sets the same seeds on both sides, and selects deterministic kernels."""
    random.seed(SEED)
    importlib.import_module("numpy").random.seed(SEED)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)


def record(
    side: str, script: str, words: list[str], steps: int, trainer: Any
) -> dict[str, Any]:
    """Runs a recipe and records its events.

    Args:
        side: ``speechbrain`` for SpeechBrain's loops, ``trainer`` for a Trainer, ``ported``
            for a script that uses ``brain_lightning.Brain``.
        script: Path of the script.
        words: Command line of the script.
        steps: See ``Recorder``.
        trainer: Trainer arguments.

    Returns:
        The ``events``, the last of which is the recipe's error if it raised one. For each
        Brain class, the counts ``trained`` and ``tested`` of ``Recorder``, the counts
        ``on_trainer`` and ``others`` of the batches that a Trainer ran, and the overridden
        ``loops``.

    Raises:
        NoSpeechBrainLoopError: On SpeechBrain's side, the script runs a Brain of
            brain_lightning.
    """
    seed_everything()
    recorder, witness = Recorder(steps), TrainerWitness()
    theirs = importlib.import_module("speechbrain.core").Brain
    recorder.watch(Brain if side == "ported" else theirs)
    if side == "speechbrain":
        _after_init(Brain, _without_loops)
    seed_everything()
    try:
        with patch_speechbrain(trainer, [witness]) if side == "trainer" else nullcontext():
            if side == "ported":
                run_recipe(script, words, trainer, [witness])
            else:
                run_script(script, words)
    except NoSpeechBrainLoopError:
        raise
    except SystemExit as end:
        if end.code not in (None, 0):
            recorder.add("error", error=f"exit status {end.code}")
    except BaseException as error:  # noqa: BLE001  a recipe may raise any exception
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
    try:
        recorded = record(**arguments)
    except NoSpeechBrainLoopError as error:
        recorded = {"mistake": str(error)}
    out.write_text(json.dumps(recorded), encoding="utf-8")
