"""Run options: their fields, the command line that gives them, and who decides."""
