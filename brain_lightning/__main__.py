"""Runs ``brain-lightning`` as ``python -m brain_lightning``."""

import sys

from brain_lightning.cli.main import main

sys.exit(main())
