"""``brain-lightning``, the command line.

``main`` finds the command; ``run``, ``verify``, ``preflight``, ``tune``, ``doctor``, ``port``
and ``convert`` are the commands, a file each, whose ``main`` adds its options to the command's
parser. ``script`` runs a recipe's script as ``python`` would; ``exit_status`` has what a shell
sees of the end. Beside a command is its other half: ``verify_recorder`` records one side in a
process; ``convert_hparams`` reads a recipe's hyperparameters.
"""
