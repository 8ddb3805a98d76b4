"""Hygiene: every test starts from the same state and leaves the process as it found it."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def _import_torchaudio() -> None:
    """Imports it, without its extensions where this build of torch cannot load them.

    PyPI's torchaudio ships extensions that are built for one version of CUDA. Missing
    ones count as "not built", so a stub in their place is enough.
    """
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
        stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
        stub.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
        sys.modules["torchaudio._extension"] = stub
        import torchaudio  # noqa: F401


def _import_speechbrain() -> None:
    """Imports it once, with its own warnings left out: they are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import speechbrain
        import speechbrain.core
        import speechbrain.utils.checkpoints  # noqa: F401


# The tensors are tiny, and other processes share the machine.
torch.set_num_threads(1)
_import_torchaudio()
_import_speechbrain()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    seed_everything(1234)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
    assert not left, f"threads were left behind: {left}"
    changed = {k for k, v in os.environ.items() if environment.get(k) != v}
    # Set by OpenMP, pytest, torch.compile and Lightning's look for a GPU.
    own = ("KMP_", "PYTEST_", "_TORCHINDUCTOR_", "TORCHINDUCTOR_", "PYTORCH_NVML_", "CUDA_")
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
