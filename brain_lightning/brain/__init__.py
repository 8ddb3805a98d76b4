"""Brain: what recipes subclass; fit, evaluate, patch."""

from .brain import Brain

__all__ = ["Brain"]
