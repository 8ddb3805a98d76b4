"""``python -m brain_lightning`` is ``brain-lightning``."""

import sys

from brain_lightning.cli.main import main

sys.exit(main())
