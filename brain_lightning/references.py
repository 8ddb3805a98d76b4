"""What methods of an object refer to by name, as far as their code is reached."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

# Whose own code is not looked into.
LIBRARIES = ("brain_lightning.", "speechbrain.", "lightning.", "torch.")


def referenced(owner: Any, methods: Iterable[str]) -> set[str]:
    """The names in the code of some methods, and in the code of methods that they name.

    Args:
        owner: An object, or a class.
        methods: The methods to begin with; those of libraries are left out.
    """
    found: set[str] = set()
    seen, waiting = set(methods), list(methods)
    while waiting:
        for function in own_functions(owner, waiting.pop()):
            names = set(_names(function.__code__))
            waiting += names - seen
            seen |= names
            found |= names
    return found


def own_functions(owner: Any, name: str) -> Iterator[FunctionType]:
    """Every definition of a method that is not a library's, also one that is decorated.

    Args:
        owner: An object, or a class.
        name: The method.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    for holder in (owner, *cls.__mro__):
        value = vars(holder).get(name)
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        function = inspect.unwrap(value) if callable(value) else None
        if isinstance(function, FunctionType) and not _is_of_a_library(function):
            yield function


def _is_of_a_library(function: FunctionType) -> bool:
    return function.__module__.startswith(LIBRARIES)


def _names(code: CodeType) -> Iterator[Any]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
