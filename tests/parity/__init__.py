"""The same experiment on real SpeechBrain and on brain_lightning, compared bit for bit."""
