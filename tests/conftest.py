"""Hygiene: every test starts from the same state and leaves the process as it found it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.environment import forget_saves, seed_everything

if sys.version_info >= (3, 14):
    # By forkserver, its default, each worker of a DataLoader imports torch, for seconds.
    multiprocessing.set_start_method("fork")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many as there are CPUs, of which each imports torch; none for a few named tests."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 8) if everything else 0


# The files that take longest, which begin first: no worker is alone with one at the end.
LONG = (
    "system/distributed/test_sharded.py", "resume/test_run_state.py",
    "system/test_documents.py", "system/distributed/test_two_processes.py",
    "parity/test_fit.py", "resume/test_interruptions.py", "parity/test_own_loops.py",
    "loggers/test_curve_plot.py", "resume/test_counterexamples.py", "resume/test_position.py",
    "callback/test_trainer_side.py", "module/test_checkpoint_file.py",
    "callback/test_called_hooks.py", "system/distributed/test_failures.py",
    "system/test_exit_status.py",
    "fsdp2/test_checkpoints.py",
)  # fmt: skip


def _place(item: pytest.Item) -> int:
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONG.index(name) if name in LONG else len(LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    seed_everything(1234)
    forget_saves()


@pytest.fixture(autouse=True)
def no_launcher_around() -> Iterator[None]:
    """The variables of a launcher that runs the tests must not leak into them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SB_GLOBAL_SEED"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def listens_to_ctrl_c() -> Iterator[None]:
    """Python does not where it was started in the background of a shell."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True)
def process_is_left_as_found(
    no_launcher_around: None, listens_to_ctrl_c: None
) -> Iterator[None]:
    environment = dict(os.environ)
    folder = os.getcwd()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = set(threading.enumerate())
    yield
    os.chdir(folder)
    assert torch.is_grad_enabled(), "gradients were left disabled"
    for listened, handler in handlers.items():
        assert signal.getsignal(listened) is handler, f"the handler of {listened} was changed"
    assert not torch.distributed.is_initialized(), "a process group was left behind"
    # torch.compile keeps a pool of threads, which Python joins at exit.
    left = [
        thread
        for thread in set(threading.enumerate()) - threads
        if not thread.daemon and not thread.name.startswith("ThreadPoolExecutor")
    ]
    for thread in left:
        # Its work is done, and was waited for: it may still be on its way out.
        thread.join(timeout=5)
    left = [thread for thread in left if thread.is_alive()]
    assert not left, f"threads were left behind: {left}"
    changed = {k for k, v in os.environ.items() if environment.get(k) != v}
    # Set by OpenMP, pytest, torch.compile, Triton, Lightning's look for a GPU, and by its
    # strategies of several processes.
    own = (
        "KMP_", "OMP_", "PYTEST_", "_TORCHINDUCTOR_", "TORCHINDUCTOR_", "TRITON_",
        "PYTORCH_NVML_", "CUDA_",
    )  # fmt: skip
    changed = {k for k in changed if not k.startswith(own)}
    assert not changed, f"environment variables were changed: {changed}"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(
    process_is_left_as_found: None,
    tmp_path: os.PathLike[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Nothing is written anywhere unless asked: a test that is not asked leaves no file."""
    folder = os.path.join(tmp_path, "cwd")
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    yield
    assert os.listdir(folder) == [], "files were written into the current folder"
