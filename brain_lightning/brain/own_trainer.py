"""From run options to a Trainer, and a run on it that behaves as a Brain's loop."""

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

# What Lightning logs of a Trainer that a user made is noise where brain.fit made it.
SILENT_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
)
EXPECTED_WARNINGS = (
    # A Brain may do without a valid_set.
    r"You defined a `validation_step` but have no `val_dataloader`",
    # A Brain's weights after its steps are what is wanted.
    r"Using ModelCheckpoint with manual optimization",
    # Each process evaluates alone.
    r"It is recommended to use `self.log\(.*sync_dist=True",
    # The losses of steps are logged where there are enough of them, the epochs' always.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # --device=cpu on a machine with a GPU is a decision.
    r"GPU available but not used",
    # Lightning 2.6 on torch 2.13, in its own CombinedLoader.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class OwnTrainer(Trainer):
    """The Trainer that ``brain.fit`` makes: it logs little and handles no signals.

    Attributes:
        may_launch: Whether Trainers may run the script again, once for each other process.
    """

    may_launch = True

    def __init__(self, **kwargs: Any) -> None:
        with _silence(), TemporaryAttributes() as temporary:
            look_up_entry_points_once(temporary)
            super().__init__(**kwargs)
        disable_signal_handlers(self)


# Arguments that decide in how many processes to run.
PROCESSES = ("devices", "num_nodes", "strategy")


# Arguments of the Trainer that hold for a fit within a fit too, as MetricGAN does it several
# times an epoch; the others, callbacks and limits among them, are meant for the outer one.
OF_EVERY_RUN = (
    "accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "deterministic",
    "benchmark", "detect_anomaly",
)  # fmt: skip


def own_trainer_arguments(brain: BrainProtocol, collective: bool = True) -> dict[str, Any]:
    """Arguments of the Trainer that ``brain.fit`` makes for itself.

    Nothing is written anywhere, and nothing but the Brain's own bar is shown.

    Args:
        brain: Runs on its device.
        collective: Whether all processes that there are take part, or this one alone.

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
    # Of SLURM it takes the signal that the job is requeued by; else its variables, and those
    # of the like, do not matter.
    requeues = trains and _tasks_of_slurm() == 1
    return {
        "devices": 1 if where.index is None or where.type == "cpu" else [where.index],
        "plugins": [SLURMEnvironment() if requeues else LightningEnvironment()],
    }


def _several_processes() -> dict[str, Any]:
    """Those that torchrun started, over all nodes, or a Trainer before this one."""
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
    """The Trainer to run on: the command line outranks the call, which outranks hparams.

    Args:
        brain: The Brain.
        trainer: What the call was given.
        collective: Whether ranks run together; each evaluates alone, as in SpeechBrain.
    """
    speechbrain.add_attributes(brain)
    settings = brain._lightning
    given = settings.trainer_arguments if trainer is None else trainer
    if settings.trainer_overrides:
        if not isinstance(given, Mapping):
            name = next(iter(settings.trainer_overrides))
            raise BrainTypeError(
                f"--trainer.{name} cannot change {given!r}: give a dict of Trainer arguments"
            )
        given = {**given, **settings.trainer_overrides}
    if trainer is None and isinstance(given, Mapping) and Run.is_running(brain):
        given = {name: value for name, value in given.items() if name in OF_EVERY_RUN}
    return make_trainer(given, brain, collective)


def make_trainer(
    trainer: Trainer | Mapping[str, Any], brain: BrainProtocol, collective: bool
) -> Trainer:
    """The Trainer to run on; the Brain learns its rank and its device from it.

    Args:
        trainer: A Trainer of the user's, or arguments for one.
        brain: The Brain.
        collective: Whether all processes that there are take part, where the arguments
            leave it open.

    Returns:
        The user's Trainer as it is, or a new one.

    Raises:
        BrainTypeError: ``trainer`` is neither.
        RunOptionError: An argument is unknown, or contradicts the Brain.
        UnsupportedError: The Trainer is in the middle of another run, has a
            strategy that a Brain cannot run on, or may not start processes.
    """
    if isinstance(trainer, Mapping):
        trainer = OwnTrainer(**_own_and_given(brain, collective, trainer))
    elif not isinstance(trainer, Trainer):
        raise BrainTypeError(
            f"trainer must be a lightning.pytorch.Trainer or a dict of its arguments, "
            f"got {trainer!r}"
        )
    # Before Lightning starts the other processes, which would run the script as well.
    check_strategy(trainer)
    _check_launch(trainer)
    if trainer.state.status is TrainerStatus.RUNNING:
        raise UnsupportedError(
            "this Trainer is running already, and a Brain called fit or evaluate in a hook: "
            "give a dict of Trainer arguments, of which each run makes a Trainer of its own"
        )
    reconcile_processes(trainer, brain, TemporaryAttributes())
    return trainer


def _check_launch(trainer: Trainer) -> None:
    """Refuses to start processes where they would run the script in another way."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_launched = environment is None or environment.creates_processes_externally
    if trainer.world_size > 1 and not (is_launched or OwnTrainer.may_launch):
        raise UnsupportedError(
            f"the other processes of Trainer(devices={trainer.num_devices}) would run the "
            "script without brain-lightning: start them by brain-lightning run "
            f"--trainer.devices={trainer.num_devices}; verify takes --trainer.devices=1"
        )


def _own_and_given(
    brain: BrainProtocol, collective: bool, trainer: Mapping[str, Any]
) -> dict[str, Any]:
    given = _as_given(trainer)
    collective = collective or any(name in given for name in PROCESSES)
    own = own_trainer_arguments(brain, collective)
    strategy = given.get("strategy")
    if isinstance(strategy, Strategy):
        # A Trainer fills in what its strategy lacks; the next one would find it taken.
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
    """How many processes srun started, this one among them; Lightning finds out about them."""
    started = SLURMEnvironment.detect() and not is_launched()
    return int(os.environ.get("SLURM_NTASKS", 1)) if started else 0


def _as_given(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A user's arguments, with the switches that the callbacks in them need."""
    check_trainer_arguments(trainer)
    given = dict(trainer)
    check_given_strategy(given.get("strategy"))
    if given.get("num_sanity_val_steps"):
        logger.warning(
            "A Brain validates in its own order: num_sanity_val_steps has no effect"
        )
    callbacks = given.get("callbacks") or []
    for callback in [callbacks] if isinstance(callbacks, Callback) else callbacks:
        if isinstance(callback, ProgressBar):
            given.setdefault("enable_progress_bar", True)
        if isinstance(callback, Checkpoint):
            given.setdefault("enable_checkpointing", True)
    return given


def run(trainer: Trainer, module: BrainModule, start: Callable[[], Any]) -> None:
    """A run of a Trainer that leaves the process as a Brain's loop would.

    Args:
        trainer: What ``make_trainer`` returned.
        module: The generated module.
        start: Calls ``fit`` or ``test`` of the Trainer.
    """
    try:
        quiet = _silence() if isinstance(trainer, OwnTrainer) else nullcontext()
        # Lightning enables gradients for good; a fit may run inside an evaluation.
        grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
        with quiet, grad_mode, _keyboard_interrupts(module):
            start()
    except HookStoppedError as error:
        # The StopIteration of a hook reaches the caller.
        raise (error.__cause__ or error) from None


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger in map(logging.getLogger, SILENT_LOGGERS):
            # Not setLevel, after which each logger there is finds out its level again.
            logger.addFilter(_is_warning)
            stack.callback(logger.removeFilter, _is_warning)
        yield


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


@contextmanager
def _keyboard_interrupts(module: BrainModule) -> Iterator[None]:
    """Lets Ctrl-C reach the caller; Lightning exits the process and ignores a second one."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        yield
    except SystemExit:
        if module.run.interrupt is None:
            raise
        raise module.run.interrupt from None
    finally:
        # A handler that a hook has set stays.
        if handler is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
