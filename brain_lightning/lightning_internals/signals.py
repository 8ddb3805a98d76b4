"""Replaces Lightning's signal handlers.

Lightning registers its handlers after ``on_fit_start``. It then waits for the other ranks, and
calls another hook only afterwards. If another rank fails, torchrun sends SIGTERM in between,
which would not end the process. Therefore it would be too late to restore the handlers in
``on_train_start``, which would need no private name.
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
    """Disables the signal handlers of a Trainer that ``brain.fit`` created.

    With Lightning's handler, SIGTERM would take effect after the batch and exit with
    status 0, also in processes that a hook forks. At the end of a run, Lightning would
    remove handlers that a hook registered.

    Args:
        trainer: The Trainer before its first run.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def is_lightning_handler(handler: object) -> bool:
    """Whether only a Trainer handles a signal.

    On SIGTERM, Lightning's handler would end the process with status 0, and run a collective
    within the handler (Lightning 2.6, ``_sigterm_notifier_fn``). On SLURM's requeue signal, it
    would save in the middle of a batch (``_slurm_sigusr_handler_fn``).

    Args:
        handler: Return value of ``signal.getsignal``.
    """
    return isinstance(handler, _HandlersCompose) and all(
        isinstance(getattr(each, "__self__", None), _SignalConnector)
        for each in handler.signal_handlers
    )


def requeue_signal(trainer: Trainer) -> int | None:
    """Returns the signal on which a SLURM job saves and is requeued, or None.

    Args:
        trainer: The Trainer, whose ``SLURMEnvironment`` has the user's settings.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def requeue_path(trainer: Trainer) -> str:
    """Returns the file from which Lightning resumes the job when it is started again.

    Args:
        trainer: The Trainer.
    """
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def requeue_job(trainer: Trainer) -> bool:
    """Makes SLURM requeue this job, as Lightning does (``_slurm_sigusr_handler_fn``).

    Args:
        trainer: The Trainer, whose rank 0 calls SLURM.

    Returns:
        Whether SLURM requeued the job, identical on all ranks.
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
            "%s failed (%s). The job is not requeued, and the run continues.",
            " ".join(command),
            status,
        )
    return not status
