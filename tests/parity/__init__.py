"""The same experiment on real SpeechBrain and on brain_lightning, compared bit for bit."""

from tests.support import environment  # noqa: F401  First: it makes SpeechBrain importable.
