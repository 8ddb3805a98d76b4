"""Compares the events of a recipe on SpeechBrain's loop and on a Trainer.

``comparison`` finds the first difference of two recordings. ``evidence`` tells which batches a
Trainer ran.
"""
