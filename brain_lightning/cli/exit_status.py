"""The exit statuses of ``brain-lightning``."""

from __future__ import annotations

MISTAKE = 2
EXPLANATION = """\
exit status:
  0    all is well
  1    verify found a difference; port left something as it is; or a crash, with
       its traceback
  2    a mistake in the command line, the recipe's options or its files; or preflight
       found no memory for a batch
  130  Ctrl-C
  143  SIGTERM; what could be saved is saved
  A script's own sys.exit(n) ends with n. With --trainer.devices=2 it is the
  status of the process that failed first.
"""


def of_process(exit_code: int) -> int:
    """The status that a shell shows for a process.

    Args:
        exit_code: As Python has it: negative for a signal.

    Returns:
        128 plus the number of the signal, or the code itself.
    """
    return 128 - exit_code if exit_code < 0 else exit_code
