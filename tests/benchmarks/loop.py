"""The cost of the loop (``python -m tests.benchmarks.loop [ROUNDS] [--json [FILE]]``)."""

from __future__ import annotations

from functools import partial

from .contestants import CONTESTANTS, Work
from .measure import interleaved, quiet, seconds
from .report import Figure, Report, compared, parser

SOME = ("PyTorch", "SpeechBrain", "brain.fit", "brain.fit, fit_batch overridden")
COLUMNS = {"without a bar": False, "with a bar": True}
WORKS = (
    Work(modules=20),
    Work(modules=4, optimizers=4),
    Work(accumulation=8),
    Work(width=700, steps=300),
    Work(width=3300, steps=60),
)


def steps(
    work: Work, rounds: int, names: tuple[str, ...], columns: tuple[str, ...] = (*COLUMNS,)
) -> dict[str, dict[str, Figure]]:
    """A step of each contestant, the start and the end of the fit shared out among all."""
    cells = {(name, column): COLUMNS[column] for name in names for column in columns}
    actions = {
        cell: partial(seconds, partial(CONTESTANTS[cell[0]], work, bar))
        for cell, bar in cells.items()
    }
    # What is only made once is made before.
    for name, column in cells:
        interleaved(1, {name: partial(CONTESTANTS[name], Work(steps=2), COLUMNS[column])})
    found = interleaved(rounds, actions)
    rows: dict[str, dict[str, Figure]] = {name: {} for name in names}
    for column in columns:
        times = {n: [s / work.steps * 1e6 for s in found[n, column]] for n in names}
        for name, figure in compared(times, "us").items():
            rows[name][column] = figure
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report(options)
    with quiet():
        tiny = Work()
        report.table(f"A step of {tiny}", steps(tiny, options.rounds, tuple(CONTESTANTS)))
        for work in WORKS:
            report.table(f"A step of {work}", steps(work, options.rounds, SOME))
    report.end()


if __name__ == "__main__":
    main()
