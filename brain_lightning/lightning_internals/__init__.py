"""Every private part of Lightning that is used, each a row of ``contract.py``."""

from .contract import check_imports

# Before the files of this folder import them.
check_imports()
