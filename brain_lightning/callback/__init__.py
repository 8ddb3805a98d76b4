"""BrainCallback fits a Trainer to a Brain: arguments reconciled, callbacks refused.

``brain_callback`` runs the stages at the right moments of a Trainer (the table is in
``stages``) and restores what it changed. Before that, ``reconcile`` gives Trainer arguments
and run options that mean the same one value, and ``unsupported`` refuses callbacks that cannot
do their work with a Brain. ``trainer_side`` saves and resumes the Trainer's counts and its
callbacks' states, ``told`` which callbacks have heard what, and ``recoverables`` has the
objects that are saved; ``savers`` finds who may save when. ``monitored`` looks for the names
that callbacks monitor. ``averaged_weights`` ends StochasticWeightAveraging; ``lightning_bars``
feeds Lightning's bars; ``profiling`` profiles the first steps.
"""
