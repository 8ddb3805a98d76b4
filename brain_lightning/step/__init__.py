"""One batch becomes one update: precision, gradients, clipping, optimizers, compile.

``update`` has SpeechBrain's ``fit_batch`` and ``optimizers_step``, with the clipping;
``optimizers`` the optimizers of a Brain and the ``OptimizerGroup`` that stands for all of them
in Lightning, ``added_groups`` parameter groups that come later; ``precision`` device, autocast
and gradient scaler; ``compile`` compiled modules, ``pruning`` pruned ones.
"""
