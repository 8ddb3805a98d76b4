"""Reports what works with a recipe, from its source, without running it.

``modules`` finds Python files and resolves their names, and ``hparams`` reads a HyperPyYAML
file. Neither imports a module or creates an object. ``method_reader`` reads one method of a
Brain into a ``method``. ``meaning`` tells whether an expression is the Brain, its modules or one of
their entries. ``source`` assembles a Brain from its classes, and from the functions to which
it passes itself. From these, ``loops`` checks custom loops, ``processes`` checks what fails in
several processes, and ``updates`` checks custom training steps. Each problem is a ``remark``.
``report`` lists for each Brain how it steps, which Trainer arguments, strategies and callbacks
are supported, and what to change.
"""

from .report import examine as examine
