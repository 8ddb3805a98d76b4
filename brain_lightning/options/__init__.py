"""Run options: how an experiment is run, as opposed to what the experiment is.

``run_options`` declares the options, their defaults and their help texts. ``parse_arguments``
reads them and the Trainer arguments from a recipe's command line. ``overrides`` handles
overrides of the YAML file, and ``value_keys`` finds the YAML key that sets a given value.
``resolve`` chooses the value of each option from the command line, hparams and the defaults.
``trainer_arguments`` has the text of ``--trainer.help``: the arguments of Lightning's Trainer,
and what each does with a Brain.
"""
