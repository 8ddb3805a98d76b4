"""Replaces files atomically, so that a killed process leaves no partial file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomically_replaced(path: Path) -> Iterator[Path]:
    """Context manager that replaces a file when its new content is written.

    Args:
        path: The file to replace.

    Yields:
        Path of the temporary file to write.
    """
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)
