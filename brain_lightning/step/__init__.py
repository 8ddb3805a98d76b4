"""One batch becomes one update: precision, gradients, clipping, compile.

``update`` has SpeechBrain's ``fit_batch`` and ``optimizers_step``, with the clipping;
``losses`` the forward pass, and when the host waits for the loss; ``window`` what each batch
weighs whose gradients are accumulated; ``precision`` device, autocast and gradient scaler;
``compile`` compiled modules, ``pruning`` pruned ones.
"""
