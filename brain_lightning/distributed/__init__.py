"""Several processes: which one this is, what all agree on, wrapping per module, SIGTERM."""

from .communication import (
    ddp_barrier,
    ddp_broadcast,
    if_main_process,
    is_distributed_initialized,
    main_process_only,
    run_on_main,
)

__all__ = [
    "ddp_barrier",
    "ddp_broadcast",
    "if_main_process",
    "is_distributed_initialized",
    "main_process_only",
    "run_on_main",
]
