"""The command line, brain-lightning."""
