"""BrainCallback fits a Trainer to a Brain: arguments reconciled, callbacks refused.

``brain_callback`` runs the stages at the right moments of a Trainer (the table is in
``stages``) and restores what it changed. Before that, ``reconcile`` gives Trainer arguments
and run options that mean the same one value, and ``unsupported`` refuses callbacks that cannot
do their work with a Brain. ``trainer_state`` saves and resumes the Trainer's counts and its
callbacks' states; ``lightning_bars`` feeds Lightning's bars; ``profiling`` profiles the first
steps.
"""
