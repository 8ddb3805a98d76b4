"""The wall time of examples/ctc_digits, here and on SpeechBrain (``-m ... [ROUNDS]``)."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.system.examples.example import Example


def main(rounds: int) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    example = Example("ctc_digits", "--number_of_epochs=2")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        ported = example.ported(Path(folder) / "ported")
        for number in range(rounds + 1):
            seconds = []
            for side in (ported, None):
                with contextlib.redirect_stdout(io.StringIO()):
                    started = time.perf_counter()
                    example.run(Path(folder) / f"{number}{side is None}", side)
                    seconds.append(time.perf_counter() - started)
            # The first round imports.
            if number:
                ratios.append(seconds[1] / seconds[0])
    spread = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
    print(f"brain_lightning / SpeechBrain: {statistics.median(ratios):.2f} of {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
