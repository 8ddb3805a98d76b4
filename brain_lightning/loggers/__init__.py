"""What is written down of a run: train logger, curves, console."""
