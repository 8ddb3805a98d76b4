"""Attributes that are changed for the time of a run and restored afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, update_wrapper
from typing import Any


class TemporaryAttributes(ExitStack):
    """Records what it changes, on a user's Trainer or on a Brain, and undoes it.

    Leaving it as a context restores everything; ``restore`` does so where the
    changes outlive a block of code.
    """

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Changes an attribute or a property.

        Args:
            owner: The object.
            name: The attribute.
            value: Its value until ``restore``.
        """
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Overrides an attribute of the class, such as a method, on one object.

        Args:
            owner: The object.
            name: The attribute.
            value: Its value until ``restore``.
        """
        own = vars(owner)
        if name in own:
            self.callback(setattr, owner, name, own[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Puts a function around a method of one object.

        Args:
            owner: The object.
            name: The method.
            wrapper: Gets the method, bound, and what it is called with.
        """
        method = getattr(owner, name)
        self.override(owner, name, update_wrapper(partial(wrapper, method), method))

    def restore(self) -> None:
        """Undoes everything, the last change first; a second call does nothing."""
        self.close()
