"""What works with a recipe, read from its source without running it.

``source`` reads a script, and the files beside it, as Python's syntax tree: its Brains, their
methods, what they use. ``report`` says of each Brain how it steps, which Trainer arguments,
strategies and callbacks it can have, and what to change.
"""

from .report import examine as examine
