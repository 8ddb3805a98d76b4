"""A recipe on SpeechBrain's loop and on a Trainer's, compared event by event.

``comparison`` finds where two recordings differ first; ``evidence`` says what a Trainer ran.
"""
