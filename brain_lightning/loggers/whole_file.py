"""Files that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Replaces a file when another one beside it is written.

    Args:
        path: The file.

    Yields:
        What to write.
    """
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)
