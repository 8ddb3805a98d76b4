"""BrainCallback: reconciles arguments, checks callbacks, and runs a Brain on a Trainer.

``brain_callback`` runs the stages from the hooks of a Trainer (the table is in ``stages``) and
restores the Trainer after the run. Before the run, ``reconcile`` gives one value to Trainer
arguments and run options with the same meaning. ``unsupported`` raises for callbacks that do
not work with a Brain. ``trainer_side`` saves and restores the Trainer's counters and callback
states. ``called_hooks`` records which callback hooks were called before a save.
``recoverables`` lists the objects that are saved. ``sharded_checkpoints`` checks whether
checkpoints can be sharded. ``savers`` determines when a callback or the recipe may save.
``monitored`` checks the metrics that callbacks monitor. ``averaged_weights`` completes
StochasticWeightAveraging. ``lightning_bars`` updates Lightning's progress bars.
``profiling`` profiles the first steps.
"""
