"""One batch becomes one update: precision, gradients, clipping, compile.

``update`` has SpeechBrain's ``fit_batch`` and ``optimizers_step``, with the clipping;
``losses`` the forward pass, and when the host waits for the loss; ``window`` what each batch
weighs whose gradients are accumulated; ``out_of_memory`` what is said and freed where there is
no memory for a batch, ``together`` how all processes give it up; ``precision`` device,
autocast and gradient scaler; ``compile`` compiled modules, ``pruning`` pruned ones.
"""
