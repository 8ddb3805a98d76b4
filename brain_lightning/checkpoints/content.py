"""The content of a checkpoint directory as one value, for a Lightning file or a state."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import CheckpointError

from .checkpoint import checkpoint_in
from .integrity import CHECKSUMS
from .meta_file import METAFNAME, dump_meta
from .recoverables import Recoverables
from .state_files import PARAMFILE_EXT, is_in_shards, load_state, write_state

Content = dict[str, Any]


def content_of(objects: Recoverables, meta: dict[str, Any]) -> Content:
    """Returns the content of a checkpoint directory of some objects.

    Args:
        objects: The objects.
        meta: Values for the meta file.

    Returns:
        The content, see ``read_files``. Empty on all ranks except rank 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects.write(Path(folder), None)
        if not if_main_process():
            return {}
        dump_meta(meta, Path(folder, METAFNAME))
        return read_files(Path(folder))


def load_content(objects: Recoverables, content: Content) -> None:
    """Recovers objects from the content of a checkpoint directory.

    Args:
        objects: The objects.
        content: Result of ``content_of``.

    Raises:
        CheckpointError: The content has no readable meta file, or lacks an object.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(content, Path(folder))
        found = checkpoint_in(Path(folder))
        if found is None:
            raise CheckpointError("the meta file of the checkpoint cannot be read")
        files = objects.files_to_load(Path("the checkpoint"), found.paramfiles)
        objects.load(files, objects.read(files), found.meta["end-of-epoch"])


def read_files(directory: Path) -> Content:
    """Reads a checkpoint directory.

    Args:
        directory: The directory.

    Returns:
        A dict with three keys. ``meta`` is the text of the meta file, so that no YAML value
        is lost. ``states`` has the states by name, from files that torch can read without
        running code. ``files`` has the bytes of all other files by relative path.
    """
    states: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        state = _state_in(path) if name == f"{path.stem}{PARAMFILE_EXT}" else None
        if state is not None:
            states[path.stem] = state
        elif path.is_file() and name not in (METAFNAME, CHECKSUMS) and not _is_shard(path):
            files[name] = path.read_bytes()
    meta = (directory / METAFNAME).read_text(encoding="utf-8")
    return {"meta": meta, "states": states, "files": files}


def _is_shard(path: Path) -> bool:
    """Whether a file belongs to a folder with a sharded state."""
    return path.parent.suffix == PARAMFILE_EXT and is_in_shards(path.parent)


def _state_in(path: Path) -> Any:
    try:
        is_read = is_in_shards(path) or zipfile.is_zipfile(path)
        return load_state(path) if is_read else None
    except CheckpointError:
        # A custom save hook wrote the file, and its load hook reads it.
        return None


def write_files(own: Content, folder: Path) -> None:
    """Writes the content that ``read_files`` has read.

    Args:
        own: Content with any of the keys ``meta``, ``states`` and ``files``.
        folder: Folder to write to.
    """
    if "meta" in own:
        (folder / METAFNAME).write_text(own["meta"], encoding="utf-8")
    for name, state in own.get("states", {}).items():
        write_state(state, folder / f"{name}{PARAMFILE_EXT}")
    for name, data in own.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
