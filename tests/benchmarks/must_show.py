"""The bounds that speed on the CPU has to keep, in under six minutes.

``python -m tests.benchmarks.must_show [ROUNDS] [--json [FILE]]``; the GPU's are in ``gpu``.
"""

from __future__ import annotations

from dataclasses import replace

from . import costs, ctc_digits, loop, processes
from .contestants import Work
from .measure import quiet
from .report import Figure, Report, parser

OURS, BY_HAND = "brain.fit", "brain.fit, fit_batch overridden"
BOTH = ("SpeechBrain", OURS)
WITHOUT = ("without a bar",)


def bounded(figure: Figure, bound: float, absolute: bool = False) -> dict[str, Figure]:
    """One row."""
    base = None if absolute else figure.base
    return {OURS: replace(figure, base=base, bound=bound)}


def steps(rounds: int) -> dict[str, dict[str, Figure]]:
    """Steps, the start and the end of the fit shared out among all."""
    tiny = loop.steps(Work(), rounds, (*BOTH, BY_HAND))
    many = loop.steps(Work(modules=20, steps=500), rounds, BOTH, WITHOUT)
    optimizers = loop.steps(Work(modules=4, optimizers=4), rounds, BOTH, WITHOUT)
    return {
        "a step, tiny": bounded(tiny[OURS]["without a bar"], 1.00),
        "a step, tiny, own fit_batch": bounded(tiny[BY_HAND]["without a bar"], 1.05),
        "a step, tiny, with a bar": bounded(tiny[OURS]["with a bar"], 0.85),
        "a step, tiny, own fit_batch, with a bar": bounded(tiny[BY_HAND]["with a bar"], 0.85),
        "a step with 20 modules": bounded(many[OURS]["without a bar"], 1.00),
        "a step with 4 optimizers": bounded(optimizers[OURS]["without a bar"], 1.00),
    }


def others(rounds: int) -> dict[str, dict[str, Figure]]:
    """What else there is to pay, on one process."""
    tensors = costs.tensors(10_000, min(rounds, 5), BOTH)
    starts, fits = costs.fit_starts(3 * rounds), costs.whole_fits(3 * rounds)
    return {
        "a step with 10,000 tensors": bounded(tensors[OURS], 1.00),
        "a batch of a validation": bounded(costs.valid_batches(rounds)[OURS], 1.00),
        "a fit, to its first batch": bounded(starts[OURS], 4.0, absolute=True),
        "a Brain and its fit of one batch": {OURS: fits[OURS]},
        "two epochs of ctc_digits": bounded(ctc_digits.epochs(min(rounds, 5))[OURS], 1.00),
    }


def two_processes(rounds: int) -> dict[str, dict[str, Figure]]:
    """A step and its collectives."""
    rows = processes.measured(2 * rounds + 1)
    found = {}
    for name, row in rows.items():
        if not name.startswith("SpeechBrain"):
            step, collectives = row["a step"], row["collectives a batch"]
            found[f"two processes, {name}: a step"] = bounded(step, 1.00)
            found[f"two processes, {name}: collectives"] = bounded(collectives, 1.00)
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report(options)
    with quiet():
        report.table("Steps", steps(options.rounds))
        report.table("Others", others(options.rounds))
        report.table("Two processes", two_processes(options.rounds))
    report.end()


if __name__ == "__main__":
    main()
