"""What methods of an object refer to by name, as far as their code is reached."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType
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
    seen = set(methods)
    functions = {function for name in seen for function in own_functions(owner, name)}
    read: set[FunctionType] = set()
    while functions:
        function = functions.pop()
        read.add(function)
        names = set(_names(function.__code__))
        found |= names
        for name in names - seen:
            functions |= set(own_functions(owner, name))
        seen |= names
        functions |= set(_called(function, names))
        functions -= read
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


def _called(function: FunctionType, names: Iterable[str]) -> Iterator[FunctionType]:
    """Functions beside the methods: those of the module, and those that a decorator keeps."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for value in (*(function.__globals__.get(name) for name in names), *cells):
        if isinstance(value, FunctionType) and not _is_of_a_library(value):
            yield value


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_of_a_library(function: FunctionType) -> bool:
    return function.__module__.startswith(LIBRARIES)


def _names(code: CodeType) -> Iterator[Any]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
