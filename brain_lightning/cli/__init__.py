"""``brain-lightning``, the command line.

``main`` finds the command. ``run``, ``verify``, ``preflight``, ``tune``, ``doctor``, ``port``
and ``convert`` are the commands, one file each. The ``main`` function of a command adds its
options to the parser that it receives. ``script`` parses the command line of a recipe's script
and runs it as ``python`` would. ``processes`` starts several processes. ``verify_recorder``
records one of the two runs that ``verify`` compares. ``convert_hparams`` reads a recipe's
hyperparameters for ``convert``.
"""
