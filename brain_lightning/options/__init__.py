"""Run options: how to run an experiment, apart from what the experiment is.

``run_options`` declares them, each with its default and its help. ``parse_arguments`` reads
them from a recipe's command line, with the Trainer's arguments; ``overrides`` are of the YAML
file, and ``value_keys`` finds by which one a value is set. ``resolve`` chooses the value of
each where the command line and hparams differ. ``trainer_arguments`` knows the arguments of
Lightning's Trainer, and what each does with a Brain: ``--trainer.help`` shows it.
"""
