"""Several processes that train one Brain: ranks, collectives, DDP, SIGTERM.

``communication`` says which rank this is, and has the collectives (its public names are
SpeechBrain's, from ``speechbrain.utils.distributed``). ``ddp`` wraps each entry of a
Brain's modules. ``termination`` handles SIGTERM, so that all ranks stop after the same
batch.
"""

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
