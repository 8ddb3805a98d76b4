"""SpeechBrain ``Brain`` recipes on PyTorch Lightning's ``Trainer``.

``__init__.pyi`` lists the exports. Type checkers read it, and this file reads it, too. A name
is imported when it is first used, so that ``brain-lightning --help`` does not wait for torch.
"""

import ast
import importlib
import pkgutil

# Read through the loader, because the package may be in a zip file.
_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_MODULES = {
    alias.name: f"{__name__}.{node.module}"
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
