"""Lightning's handlers of signals.

Lightning registers them after ``on_fit_start``, waits for the other processes, and only
then calls another hook. A SIGTERM in between, as torchrun sends it where a process has
failed, would not end the process; so handlers that are put back in ``on_train_start``, which
needs nothing private, come too late.
"""

from __future__ import annotations

import logging
import os
import subprocess

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import (
    _HandlersCompose,
    _SignalConnector,
)

logger = logging.getLogger(__name__)


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keeps a Trainer that ``brain.fit`` made from handling signals.

    SIGTERM would else wait for the end of the batch and exit with status 0, in
    processes that a hook forks as well; and at the end of a run Lightning would undo
    what a hook has registered.

    Args:
        trainer: The Trainer before its first run.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def is_lightning_handler(handler: object) -> bool:
    """Whether a signal is handled by a Trainer, and by nothing else.

    For SIGTERM it would end the process with status 0, and makes a collective call from
    within the signal (Lightning 2.6, ``_sigterm_notifier_fn``); for the signal by which SLURM
    requeues a job it would save in the middle of a batch (``_slurm_sigusr_handler_fn``).

    Args:
        handler: What ``signal.getsignal`` returned.
    """
    return isinstance(handler, _HandlersCompose) and all(
        isinstance(getattr(each, "__self__", None), _SignalConnector)
        for each in handler.signal_handlers
    )


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal at which a job of SLURM's saves and is requeued; None where none does.

    Args:
        trainer: The Trainer; ``SLURMEnvironment`` has what its user asked for.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def requeue_path(trainer: Trainer) -> str:
    """The file from which Lightning resumes the job when it is started again.

    Args:
        trainer: The Trainer.
    """
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def requeue_job(trainer: Trainer) -> bool:
    """Has SLURM queue this job again, as Lightning does (``_slurm_sigusr_handler_fn``).

    Args:
        trainer: The Trainer; its first process asks SLURM.

    Returns:
        Whether SLURM has agreed, the same in all processes.
    """
    done = trainer.is_global_zero and _requeue()
    return bool(trainer.strategy.broadcast(done))


def _requeue() -> bool:
    array, task = (os.environ.get(f"SLURM_ARRAY_{of}_ID") for of in ("JOB", "TASK"))
    job = os.environ.get("SLURM_JOB_ID", "") if array is None else f"{array}_{task}"
    command = ["scontrol", "requeue", job]
    try:
        status: object = subprocess.run(command, check=False).returncode  # noqa: S603
    except OSError as error:
        status = error
    if status:
        logger.warning(
            "%s failed (%s): the job is not requeued, and the run goes on.",
            " ".join(command),
            status,
        )
    return not status
