"""Creates a Trainer from run options, and runs it so that it behaves as a Brain's loop."""

from __future__ import annotations

import copy
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus

from brain_lightning.callback.reconcile import reconcile_processes
from brain_lightning.compat import speechbrain
from brain_lightning.distributed.communication import is_distributed_initialized, is_launched
from brain_lightning.errors import BrainTypeError, HookStoppedError, UnsupportedError
from brain_lightning.lightning_internals.signals import disable_signal_handlers
from brain_lightning.lightning_internals.strategies import check_given_strategy, check_strategy
from brain_lightning.lightning_internals.trainer_callbacks import look_up_entry_points_once
from brain_lightning.module.brain_module import BrainModule
from brain_lightning.options.trainer_arguments import check_trainer_arguments
from brain_lightning.protocol import BrainProtocol
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

# Loggers that are set to WARNING if brain.fit created the Trainer.
SILENT_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
)
EXPECTED_WARNINGS = (
    # A Brain needs no valid_set.
    r"You defined a `validation_step` but have no `val_dataloader`",
    # A Brain is meant to save the weights after its steps.
    r"Using ModelCheckpoint with manual optimization",
    # Each rank evaluates the full set.
    r"It is recommended to use `self.log\(.*sync_dist=True",
    # In a short epoch no loss of a step is logged, but the loss of the epoch is.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # The user chose --device=cpu.
    r"GPU available but not used",
    # Lightning 2.6 causes it in CombinedLoader, with torch 2.13.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class OwnTrainer(Trainer):
    """The Trainer that ``brain.fit`` creates: it logs little and handles no signals.

    Attributes:
        may_launch: Whether a Trainer may start the other ranks by running the script again.
    """

    may_launch = True

    def __init__(self, **kwargs: Any) -> None:
        with _silence(), TemporaryAttributes() as temporary:
            look_up_entry_points_once(temporary)
            super().__init__(**kwargs)
        disable_signal_handlers(self)


# Arguments that decide the number of processes.
PROCESSES = ("devices", "num_nodes", "strategy")


# Arguments of the Trainer that also apply to a fit within a fit. (MetricGAN calls fit several
# times per epoch.) Other arguments, such as callbacks and limits, are for the outer fit.
OF_EVERY_RUN = (
    "accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "deterministic",
    "benchmark", "detect_anomaly",
)  # fmt: skip


def own_trainer_arguments(brain: BrainProtocol, collective: bool = True) -> dict[str, Any]:
    """Returns the default arguments of the Trainer that ``brain.fit`` creates.

    This Trainer writes no files, and shows only the Brain's own progress bar.

    Args:
        brain: The Brain, whose device the Trainer uses.
        collective: Whether all ranks run together, or this rank runs by itself.

    Returns:
        Keyword arguments of ``Trainer``.
    """
    several = collective and (is_launched() or is_distributed_initialized())
    return {
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        **(_several_processes() if several else _one_process(brain.device, collective)),
        "accelerator": torch.device(brain.device).type,
    }


def _one_process(device: str, trains: bool) -> dict[str, Any]:
    where = torch.device(device)
    # With SLURMEnvironment, Lightning handles the requeue signal. Otherwise the variables of
    # SLURM and other launchers are ignored.
    requeues = trains and _tasks_of_slurm() == 1
    return {
        "devices": 1 if where.index is None or where.type == "cpu" else [where.index],
        "plugins": [SLURMEnvironment() if requeues else LightningEnvironment()],
    }


def _several_processes() -> dict[str, Any]:
    """Arguments for the processes that torchrun or an earlier Trainer started."""
    if not is_launched():
        processes = here = torch.distributed.get_world_size()
        environment: ClusterEnvironment = LightningEnvironment()
    else:
        processes = int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        environment = TorchElasticEnvironment()
    nodes = processes // here
    return {"devices": here, "num_nodes": nodes, "strategy": "ddp", "plugins": [environment]}


def trainer_for(
    brain: BrainProtocol, trainer: Trainer | Mapping[str, Any] | None, collective: bool = True
) -> Trainer:
    """Returns the Trainer to run on.

    The command line takes precedence over the argument, and the argument over hparams.

    Args:
        brain: The Brain.
        trainer: The argument of ``fit`` or ``evaluate``.
        collective: Whether all ranks run together. In ``evaluate`` each rank runs by itself,
            as in SpeechBrain.

    Returns:
        The user's Trainer, or a new one.
    """
    speechbrain.add_attributes(brain)
    settings = brain._lightning
    given = settings.trainer_arguments if trainer is None else trainer
    if settings.trainer_overrides:
        if not isinstance(given, Mapping):
            name = next(iter(settings.trainer_overrides))
            raise BrainTypeError(
                f"--trainer.{name} cannot change {given!r}, which is not a dict. "
                "Pass a dict of Trainer arguments as trainer."
            )
        given = {**given, **settings.trainer_overrides}
    if trainer is None and isinstance(given, Mapping) and Run.is_running(brain):
        given = {name: value for name, value in given.items() if name in OF_EVERY_RUN}
    return make_trainer(given, brain, collective)


def make_trainer(
    trainer: Trainer | Mapping[str, Any], brain: BrainProtocol, collective: bool
) -> Trainer:
    """Returns the Trainer to run on, and sets the Brain's rank and device from it.

    Args:
        trainer: The user's Trainer, or arguments for one.
        brain: The Brain.
        collective: Whether all ranks run together, if the arguments do not set the number of
            processes.

    Returns:
        The user's Trainer unchanged, or a new one.

    Raises:
        BrainTypeError: If ``trainer`` is neither a Trainer nor a dict.
        RunOptionError: If an argument is unknown, or contradicts the Brain.
        UnsupportedError: If the Trainer is running, has a strategy that is not supported,
            or would start processes although this is disabled.
    """
    if isinstance(trainer, Mapping):
        trainer = OwnTrainer(**_own_and_given(brain, collective, trainer))
    elif not isinstance(trainer, Trainer):
        raise BrainTypeError(
            f"trainer must be a lightning.pytorch.Trainer or a dict of its arguments, but got "
            f"{trainer!r}."
        )
    # Check before Lightning starts the other processes, which would also run the script.
    check_strategy(trainer)
    _check_launch(trainer)
    if trainer.state.status is TrainerStatus.RUNNING:
        raise UnsupportedError(
            "a hook called fit or evaluate of a Brain with a Trainer that is already running. "
            "Pass a dict of Trainer arguments instead, so that each run creates a new Trainer."
        )
    reconcile_processes(trainer, brain, TemporaryAttributes())
    return trainer


def _check_launch(trainer: Trainer) -> None:
    """Raises if the Trainer would start processes that run the script without the patch."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_launched = environment is None or environment.creates_processes_externally
    if trainer.world_size > 1 and not (is_launched or OwnTrainer.may_launch):
        raise UnsupportedError(
            f"the other processes of Trainer(devices={trainer.num_devices}) would run the "
            "script without brain-lightning. Use brain-lightning run "
            f"--trainer.devices={trainer.num_devices} to start them. For brain-lightning "
            "verify, use --trainer.devices=1."
        )


def _own_and_given(
    brain: BrainProtocol, collective: bool, trainer: Mapping[str, Any]
) -> dict[str, Any]:
    given = _as_given(trainer)
    collective = collective or any(name in given for name in PROCESSES)
    own = own_trainer_arguments(brain, collective)
    strategy = given.get("strategy")
    if isinstance(strategy, Strategy):
        # A Trainer sets attributes of its strategy, so the next Trainer needs a fresh copy.
        given["strategy"] = strategy = copy.copy(strategy)
        if strategy.accelerator is not None:
            del own["accelerator"]
    elsewhere = getattr(strategy, "cluster_environment", None) is not None
    several = any(name in given for name in PROCESSES)
    if elsewhere or "num_nodes" in given or (several and _tasks_of_slurm() > 1):
        del own["plugins"]
    elif several and _tasks_of_slurm() == 1:
        own["plugins"] = [LightningEnvironment()]
    return own | given


def _tasks_of_slurm() -> int:
    """Returns how many processes srun started, or 0 if srun did not start this process."""
    started = SLURMEnvironment.detect() and not is_launched()
    return int(os.environ.get("SLURM_NTASKS", 1)) if started else 0


def _as_given(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the user's arguments, with the arguments that their callbacks need."""
    check_trainer_arguments(trainer)
    given = dict(trainer)
    check_given_strategy(given.get("strategy"))
    if given.get("num_sanity_val_steps"):
        logger.warning(
            "Trainer(num_sanity_val_steps=%s) has no effect, because a Brain has no sanity "
            "check before training.",
            given["num_sanity_val_steps"],
        )
    callbacks = given.get("callbacks") or []
    for callback in [callbacks] if isinstance(callbacks, Callback) else callbacks:
        if isinstance(callback, ProgressBar):
            given.setdefault("enable_progress_bar", True)
        if isinstance(callback, Checkpoint):
            given.setdefault("enable_checkpointing", True)
    return given


def run(trainer: Trainer, module: BrainModule, start: Callable[[], Any]) -> None:
    """Runs a Trainer, with the side effects on the process that a Brain's loop has.

    Args:
        trainer: The Trainer from ``make_trainer``.
        module: The generated module.
        start: Function that calls ``fit`` or ``test`` of the Trainer.
    """
    try:
        quiet = _silence() if isinstance(trainer, OwnTrainer) else nullcontext()
        # Lightning leaves gradients enabled after fit, but a fit may run inside an evaluation.
        grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
        with quiet, grad_mode, _keyboard_interrupts(module):
            start()
    except HookStoppedError as error:
        # Raise the StopIteration that a hook raised.
        raise (error.__cause__ or error) from None


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger in map(logging.getLogger, SILENT_LOGGERS):
            # setLevel would be slow: it clears the cached levels of all loggers.
            logger.addFilter(_is_warning)
            stack.callback(logger.removeFilter, _is_warning)
        yield


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


@contextmanager
def _keyboard_interrupts(module: BrainModule) -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C, while Lightning would exit the process."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        yield
    except SystemExit:
        if module.run.interrupt is None:
            raise
        raise module.run.interrupt from None
    finally:
        # Lightning ignores a second Ctrl-C. Keep a handler that a hook has set.
        if handler is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
