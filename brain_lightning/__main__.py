"""``python -m brain_lightning`` is ``brain-lightning``."""

import sys

from .cli import main

sys.exit(main())
