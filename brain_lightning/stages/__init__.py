"""SpeechBrain's order of events: one run, its TRAIN, VALID and TEST, its numbers."""
