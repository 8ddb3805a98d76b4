"""Attributes that are changed for the time of a run and put back afterwards."""

from __future__ import annotations

from typing import Any

_MISSING = object()


class TemporaryAttributes:
    """Remembers what it changes, on a user's Trainer or on a Brain, and undoes it."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Changes an attribute or a property.

        Args:
            owner: The object.
            name: The attribute.
            value: Its value until ``restore``.
        """
        self._old.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Puts something in front of an attribute of the class, such as a method.

        Args:
            owner: The object.
            name: The attribute.
            value: What stands in its place until ``restore``.
        """
        self._old.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Undoes everything, the last change first; a second call does nothing."""
        while self._old:
            owner, name, value = self._old.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
