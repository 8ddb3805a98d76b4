"""Descriptors that let a recipe read settings as attributes of a Brain.

If a recipe assigns an attribute of the same name, the recipe's value takes precedence.
"""

from __future__ import annotations

from typing import Any

from brain_lightning.protocol import is_value_of


class Setting:
    """Reads one field of a Brain's ``LightningSettings``.

    A recipe may use the same name for a class attribute or an attribute of ``self``. Its value
    belongs to the recipe, and runs ignore it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        return self if brain is None else getattr(brain._lightning, self.name)


class OptionSetting(Setting):
    """A run option. If a hook of a recipe assigns a valid value, the option changes."""

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        own = {} if brain is None else vars(brain)
        return own[self.name] if self.name in own else super().__get__(brain, owner)

    def __set__(self, brain: Any, value: Any) -> None:
        own = vars(brain)
        if "_lightning" in own and is_value_of(self.name, value):
            own.pop(self.name, None)
            setattr(brain._lightning, self.name, value)
        else:
            own[self.name] = value
