"""Runs the command line: ``python -m brain_lightning`` is the same as ``brain-lightning``."""

import sys

from brain_lightning.cli.main import main

sys.exit(main())
