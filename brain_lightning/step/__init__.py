"""The optimizer step of a batch: precision, loss, gradients, clipping, compilation.

``update`` has SpeechBrain's ``fit_batch`` and ``optimizers_step``, with gradient clipping.
``losses`` computes and checks the loss, and decides when the host waits for it. ``window``
computes the weights of batches in an accumulation window. ``out_of_memory`` detects and
describes out-of-memory errors, and ``synchronized`` lets all ranks skip a batch if one rank is
out of memory. ``precision`` has the device, autocast and the gradient scaler. ``compile``
compiles modules, and ``pruning`` loads pruned modules.
"""
