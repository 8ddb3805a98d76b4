"""The wall time of two epochs of examples/ctc_digits, here and on SpeechBrain.

``python -m tests.benchmarks.ctc_digits [ROUNDS] [--json [FILE]]``
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from tests.support import environment  # noqa: F401  First: it makes SpeechBrain importable.
from tests.system.examples.example import Example

from .measure import interleaved, quiet, seconds
from .report import Figure, Report, compared, parser


def epochs(rounds: int) -> dict[str, Figure]:
    """Whole runs of the recipe, in this process."""
    example = Example("ctc_digits", "--number_of_epochs=2")
    with tempfile.TemporaryDirectory() as folder:
        sides = {"SpeechBrain": example.ported(Path(folder, "ported")), "brain.fit": None}

        def run(side: Path | None) -> float:
            output = Path(tempfile.mkdtemp(dir=folder))
            return seconds(partial(example.run, output, side))

        actions = {name: partial(run, side) for name, side in sides.items()}
        # The first round imports.
        interleaved(1, actions)
        return compared(interleaved(rounds, actions), "s")


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report(options)
    with quiet():
        report.table("Two epochs of ctc_digits", {"wall time": epochs(options.rounds)})
    report.end()


if __name__ == "__main__":
    main()
