"""What can go wrong, each a subclass of the built-in error that recipes catch already."""


class RunOptionError(ValueError):
    """A run option has a value, or stands beside one, that makes no sense."""


class UnsupportedError(ValueError):
    """An option or a setting that is not supported: refused, never ignored."""


class RecipeError(ValueError):
    """A recipe, or a file that goes with it, that cannot be read or run as asked."""


class UnequalDataError(ValueError):
    """Processes that train together have different numbers of batches."""


class RankMismatchError(RuntimeError):
    """Processes that train together are not at the same place, or in the same state."""


class MainProcessError(RuntimeError):
    """What the main process did for all of them has failed."""


class BrainTypeError(TypeError):
    """An argument of a Brain, or what one of its hooks returned, is of the wrong type."""


class PreflightError(ValueError):
    """There is no memory for a batch that a run will have: told before it begins."""


class HookStoppedError(RuntimeError):
    """A hook raised StopIteration, which Lightning would take for the end of the data.

    ``brain.fit`` and ``brain.evaluate`` raise the StopIteration itself, as SpeechBrain.
    """


class NonFiniteLossError(ValueError):
    """The loss was not finite more often than ``nonfinite_patience`` allows."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, would run code, or does not hold what is asked for."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not as it was saved; another one may be."""


class UnsafeCheckpointError(CheckpointError):
    """A file is whole, and loading it would run code: it is left alone."""


class NotInCheckpointError(CheckpointError):
    """A checkpoint was saved without something that is to be recovered."""


class NoSuchCheckpointError(ValueError):
    """A checkpoint is asked for that is not there, or beside a key that chooses another."""


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; the earlier ones are as they were."""
