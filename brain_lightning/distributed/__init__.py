"""Several processes that train one Brain: ranks, collectives, DDP, signals.

``communication`` has the rank of this process and the collectives. Its public names are those
of ``speechbrain.utils.distributed``. ``batch_flags`` has the only collective that a training
batch adds. ``gradients`` averages gradients if DDP does not. ``agreement`` checks that all
ranks are at the same point of a run. ``process_group`` creates the process group if the script
does not. ``ddp`` wraps each entry of a Brain's modules. ``termination`` handles SIGTERM and
similar signals, so that all ranks stop after the same batch.
"""

from .communication import ddp_barrier as ddp_barrier
from .communication import ddp_broadcast as ddp_broadcast
from .communication import if_main_process as if_main_process
from .communication import is_distributed_initialized as is_distributed_initialized
from .communication import main_process_only as main_process_only
from .communication import run_on_main as run_on_main
