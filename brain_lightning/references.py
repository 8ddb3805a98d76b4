"""Finds the names and strings that the methods of an object refer to in their code."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

# The code of these packages is not searched.
LIBRARIES = ("brain_lightning.", "speechbrain.", "lightning.", "torch.")

# Limits for the search for strings. Larger or deeper values are data, or contain themselves.
MOST_ITEMS = 2000
DEEPEST = 8


def referenced(owner: Any, methods: Iterable[str]) -> set[str]:
    """Returns the names in the code of methods, and in the code of methods that they name.

    Args:
        owner: An object or a class.
        methods: Names of the methods to start with. Methods of libraries are ignored.
    """
    return {name for each in _reached(owner, methods) for name in _names(each.__code__)}


def calls_super(owner: Any, method: str) -> bool:
    """Returns whether an overridden method calls the library's method of the same name.

    The check only looks for the name of the method in its code.

    Args:
        owner: An object.
        method: Name of the method.
    """
    own = [set(_names(each.__code__)) for each in own_functions(owner, method)]
    return bool(own) and all(method in names for names in own)


def own_methods(owner: Any) -> set[str]:
    """Returns the names of all methods of an object that no library defines.

    Args:
        owner: An object.
    """
    names = {name for holder in (owner, *type(owner).__mro__) for name in vars(holder)}
    return {name for name in names if any(own_functions(owner, name))}


def texts(owner: Any) -> set[str]:
    """Returns the strings in the code of an object's own methods and in what the code names.

    Args:
        owner: An object.
    """
    found: set[str] = set()
    for function in _reached(owner, own_methods(owner)):
        found |= texts_in(function)
        named = [function.__globals__.get(name) for name in _names(function.__code__)]
        found |= texts_in([each for each in named if not isinstance(each, FunctionType)])
    own = [cls for cls in type(owner).__mro__ if not cls.__module__.startswith(LIBRARIES)]
    values = [value for cls in own for value in vars(cls).values()]
    return found | texts_in([each for each in values if not isinstance(each, FunctionType)])


def texts_in(value: Any, depth: int = 0) -> set[str]:
    """Returns the strings in a value, such as a collection or the constants of a function.

    Args:
        value: Any value. Large collections are treated as data without strings.
        depth: Number of collections around the value.
    """
    if isinstance(value, str):
        return {value}
    items: Collection[Any] = ()
    if isinstance(value, FunctionType):
        items = value.__code__.co_consts
    elif isinstance(value, CodeType):
        items = value.co_consts
    elif isinstance(value, Mapping):
        items = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = value
    if depth > DEEPEST or len(items) > MOST_ITEMS:
        return set()
    return {text for item in items for text in texts_in(item, depth + 1)}


def _reached(owner: Any, methods: Iterable[str]) -> set[FunctionType]:
    seen = set(methods)
    functions = {function for name in seen for function in own_functions(owner, name)}
    read: set[FunctionType] = set()
    while functions:
        function = functions.pop()
        read.add(function)
        names = set(_names(function.__code__))
        for name in names - seen:
            functions |= set(own_functions(owner, name))
        seen |= names
        functions |= set(_called(function, names))
        functions -= read
    return read


def own_functions(owner: Any, name: str) -> Iterator[FunctionType]:
    """Yields every definition of a method that no library defines, without its decorators.

    Args:
        owner: An object or a class.
        name: Name of the method.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    for holder in (owner, *cls.__mro__):
        value = vars(holder).get(name)
        if value is None:
            continue
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        function = inspect.unwrap(value) if callable(value) else None
        if isinstance(function, FunctionType) and not _is_of_a_library(function):
            yield function


def _called(function: FunctionType, names: Iterable[str]) -> Iterator[FunctionType]:
    """Yields functions that a method uses: those of its module and those in its closure."""
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
