"""A script that ends as its first word says, in the last of its processes."""

import os
import signal
import sys

import brain_lightning

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if sys.argv[1] == "waits":
    # In one piece: another process says it too.
    print(f"ready {os.getpid()}\n", end="", flush=True)
    signal.pause()
if sys.argv[1] == "all is well":
    sys.exit()
if rank < world_size - 1:
    # Until the launcher ends it.
    signal.pause()
if sys.argv[1] == "exits":
    sys.exit(7)
if sys.argv[1] == "crashes":
    raise KeyError("of the recipe's own")
if sys.argv[1] == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "has a mistake":
    brain_lightning.Brain(run_opts={"device": "cpu", "progress": "tqdm"})
