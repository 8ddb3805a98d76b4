"""Attributes that are changed during a run and restored after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, update_wrapper
from typing import Any


class TemporaryAttributes(ExitStack):
    """Changes attributes of a user's Trainer or Brain, and restores them.

    Leaving the object as a context restores everything. If the changes outlive a block of
    code, call ``restore``.
    """

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute or a property.

        Args:
            owner: The object.
            name: Name of the attribute.
            value: Value until ``restore``.
        """
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Overrides an attribute of the class, such as a method, on one object.

        Args:
            owner: The object.
            name: Name of the attribute.
            value: Value until ``restore``.
        """
        own = vars(owner)
        if name in own:
            self.callback(setattr, owner, name, own[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Wraps a method of one object.

        Args:
            owner: The object.
            name: Name of the method.
            wrapper: Called with the bound method, followed by the arguments of the call.
        """
        method = getattr(owner, name)
        self.override(owner, name, update_wrapper(partial(wrapper, method), method))

    def restore(self) -> None:
        """Restores everything, the last change first. A second call does nothing."""
        self.close()
