"""Exception types. Each derives from the built-in exception that recipes already catch."""


class RunOptionError(ValueError):
    """The value of a run option is invalid, or it conflicts with another option."""


class UnsupportedError(ValueError):
    """An option or a setting is not supported. It is never silently ignored."""


class RecipeError(ValueError):
    """A recipe, or a file that it needs, cannot be read or run as requested."""


class UnequalDataError(ValueError):
    """Processes that train together have different numbers of batches."""


class RankMismatchError(RuntimeError):
    """Processes that train together are at different points of a run, or differ in state."""


class MainProcessError(RuntimeError):
    """A function that the main process ran for all processes raised an error."""


class BrainTypeError(TypeError):
    """An argument of a Brain, or the return value of one of its hooks, has the wrong type."""


class PreflightError(ValueError):
    """A batch of the run would run out of memory. Raised before training starts."""


class HookStoppedError(RuntimeError):
    """A hook raised StopIteration, which Lightning would treat as the end of the data.

    ``brain.fit`` and ``brain.evaluate`` raise the StopIteration itself, as SpeechBrain does.
    """


class NonFiniteLossError(ValueError):
    """The loss was NaN or infinite more often than ``nonfinite_patience`` allows."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, would run code, or does not contain what is requested."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was saved. Another checkpoint may be intact."""


class UnsafeCheckpointError(CheckpointError):
    """A file is intact, but loading it would run code. It is not loaded."""


class NotInCheckpointError(CheckpointError):
    """A checkpoint was saved without a recoverable that is to be recovered."""


class NoSuchCheckpointError(ValueError):
    """The requested checkpoint does not exist, or more than one argument selects one."""


class CheckpointSaveError(OSError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""
