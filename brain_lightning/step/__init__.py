"""One batch becomes one update: precision, gradients, clipping, optimizers, compile.

``update`` has SpeechBrain's ``fit_batch`` and ``optimizers_step``, with the clipping;
``losses`` the forward pass, and when the host waits for the loss; ``optimizers`` the
optimizers of a Brain, ``optimizer_group`` the ``OptimizerGroup`` that is all of them in
Lightning, ``initial_groups`` parameter groups that change, ``trained_parts`` what is frozen
and unfrozen; ``precision`` device, autocast and gradient scaler; ``compile`` compiled modules,
``pruning`` pruned ones.
"""
