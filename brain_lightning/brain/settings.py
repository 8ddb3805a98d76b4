"""Names of ours on a Brain: readable, and a recipe's as soon as it takes one."""

from __future__ import annotations

from typing import Any

from brain_lightning.protocol import is_value_of


class Setting:
    """Reads one of a Brain's ``LightningSettings``.

    What a recipe's class or ``self.name = ...`` puts in its place is the recipe's own, and
    means nothing to a run.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        return self if brain is None else getattr(brain._lightning, self.name)


class OptionSetting(Setting):
    """A run option, which a recipe may change in a hook by a value that makes sense for it."""

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
