"""Every private part of Lightning that is used, each a row of ``contract``.

``attach`` puts our subclasses in the place of a Trainer's loops for one run: ``loops`` makes
epochs and stages a Brain's, ``parts`` runs them one by one where a recipe brings a loop of its
own, ``lean_loops`` leaves out the hooks that nobody has. ``loaders`` gives the loops the
loaders of the stages, ``counters`` sets and moves their counts.
``strategies``, ``signals``, ``checkpoint_connector``, ``loggers`` and ``trainer_callbacks``
each have what is needed of that part of Lightning.
"""

from .contract import check_imports

# Before the files of this folder import them.
check_imports()
