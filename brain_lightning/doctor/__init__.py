"""What works with a recipe, read from its source without running it.

``modules`` finds files of Python and what their names stand for, ``hparams`` reads a
HyperPyYAML file, both without making or importing anything. ``reading`` reads one method of a
Brain, by what its expressions have for a ``meaning``, into a ``method``; ``source`` puts a
Brain together from its classes, and from the functions that it gives itself to. Of that,
``loops`` says what own loops come to, ``processes`` what several processes do not stand, and
``updates`` what an own step leaves out, each as a ``remark``. ``report`` says of each Brain
how it steps, which Trainer arguments, strategies and callbacks are safe with it, and what to
change.
"""

from .report import examine as examine
