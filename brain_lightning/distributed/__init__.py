"""Several processes that train one Brain: ranks, collectives, DDP, SIGTERM.

``communication`` says which rank this is, and has the collectives (its public names are
SpeechBrain's, from ``speechbrain.utils.distributed``). ``batch_flags`` is the one collective
of a training batch; ``gradients`` are averaged where DDP does not. ``agreement`` compares what
ranks are about to do. ``process_group`` makes the group of a script that makes none. ``ddp``
wraps each entry of a Brain's modules. ``termination`` handles SIGTERM and the like, so that all
ranks stop after the same batch.
"""

from .communication import ddp_barrier as ddp_barrier
from .communication import ddp_broadcast as ddp_broadcast
from .communication import if_main_process as if_main_process
from .communication import is_distributed_initialized as is_distributed_initialized
from .communication import main_process_only as main_process_only
from .communication import run_on_main as run_on_main
