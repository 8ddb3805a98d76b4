"""The only folder that uses private names of Lightning; ``contract`` lists them all.

``attach`` replaces the loops of a Trainer by brain_lightning's subclasses for one run.
``loops`` runs the epochs and stages of a Brain. ``parts`` runs single stages for recipes with
a custom loop. ``lean_loops`` skips hooks that no callback overrides. ``loaders`` passes the
loaders of the stages to the loops. ``counters`` reads and sets the progress counters.
``strategies``, ``signals``, ``checkpoint_connector``, ``loggers`` and ``trainer_callbacks``
access these parts of Lightning.
"""

from .contract import check_imports

# Check before the files of this folder import private names.
check_imports()
