"""What a step, a batch of a validation and a save cost on a GPU, in under four minutes.

``python -m tests.benchmarks.gpu [ROUNDS] [--device cpu] [--json [FILE]]``: in bf16, against
SpeechBrain's loop where SpeechBrain is installed. Batches are on the device already, so that
the waits that are counted are those of the loop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from .checkpoint_stall import stalls
from .contestants import CLIP, CONTESTANTS, Contestant, Work, forward, speechbrain
from .measure import PeakMemory, Seconds, Waits, interleaved, quiet
from .report import Figure, Report, compared, parser


@dataclass(frozen=True)
class Task(Work):
    """A model, with batches of one shape.

    Attributes:
        model: Makes it.
        shape: Of a batch.
    """

    model: Callable[[], nn.Module] = nn.Identity
    shape: tuple[int, ...] = ()

    def make_layers(self) -> dict[str, nn.Module]:
        return {"model": self.model()}

    def batches(self, steps: int) -> DataLoader[Any]:
        batch = (torch.randn(self.shape, device=self.device),)
        return DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, 1e-4)


class Conformer(nn.Module):
    """SpeechBrain's, with what it needs beyond a batch."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
        from speechbrain.nnet.attention import RelPosEncXL

        self.positions = RelPosEncXL(width)
        self.encoder = ConformerEncoder(layers, width, 4 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, pos_embs=self.positions(x))[0]


def transformer(layers: int, width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, layers), nn.Linear(width, 30))


def conformer(layers: int, width: int) -> nn.Module:
    """A transformer of its size where there is no SpeechBrain."""
    if speechbrain is None:
        return transformer(layers, width)
    return nn.Sequential(Conformer(layers, width), nn.Linear(width, 30))


class Size(NamedTuple):
    """Of an encoder, and of its batches."""

    layers: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}"


def tasks(device: str) -> dict[str, tuple[Task, int]]:
    """What is trained, and how many steps of it are measured; next to nothing on the CPU."""
    task = partial(Task, device=device, precision="bf16")
    tiny = task(model=partial(nn.Linear, 10, 10), shape=(4, 10))

    def encoder(make: Callable[[int, int], nn.Module], size: Size, batch: int) -> Task:
        model = partial(make, size.layers, size.width)
        return task(model=model, shape=(batch, size.frames, size.width))

    second = "conformer" if speechbrain else "second transformer"
    if device == "cpu":
        small = Size(layers=1, width=64, frames=8)
        return {
            f"transformer {small}": (encoder(transformer, small, 32), 3),
            f"{second} {small}": (encoder(conformer, small, 16), 3),
            "Linear(10, 10)": (tiny, 3),
        }
    wide, deep = Size(layers=6, width=768, frames=400), Size(layers=8, width=256, frames=200)
    return {
        f"transformer {wide}": (encoder(transformer, wide, 32), 20),
        f"{second} {deep}": (encoder(conformer, deep, 16), 20),
        "Linear(10, 10)": (tiny, 300),
    }


def plain(work: Work, bar: bool) -> None:
    """A loop that never waits: it does not know whether a loss is finite."""
    layers = work.layers()
    optimizer = work.make_optimizers(layers)["o0"]
    average = torch.zeros((), device=work.device)
    for step, (x,) in enumerate(work.loader(), 1):
        with torch.autocast(work.device.partition(":")[0], torch.bfloat16):
            loss = forward(layers.values(), x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        average += (loss.detach() - average) / step


TRAINING = {
    "plain loop": plain,
    **{
        name: CONTESTANTS[name]
        for name in (
            "SpeechBrain", "brain.fit", "brain.fit, fit_batch overridden",
            "LightningModule, the same work",
        )
        if name in CONTESTANTS
    },
}  # fmt: skip
VALIDATION = {n: TRAINING[n] for n in ("SpeechBrain", "brain.fit") if n in TRAINING}


def table(
    work: Work, steps: int, rounds: int, valid: bool = False
) -> dict[str, dict[str, Figure]]:
    """Time and ratio, waits, and memory, of each contestant."""
    contestants = VALIDATION if valid else TRAINING
    measure = partial(_measure, work, steps, valid)
    found = interleaved(rounds, {n: partial(measure, run) for n, run in contestants.items()})
    times = compared({n: [ms for ms, _ in measured] for n, measured in found.items()}, "ms")
    rows: dict[str, dict[str, Figure]] = {name: {"time": times[name]} for name in contestants}
    if work.device != "cpu":
        for name, row in rows.items():
            row["waits"] = Figure([_waits(work, steps, valid, contestants[name])], "waits")
            row["memory"] = Figure([mebibytes for _, mebibytes in found[name]], "MiB")
    return rows


def _measure(work: Work, steps: int, valid: bool, run: Contestant) -> tuple[float, float]:
    watch, memory = Seconds(), PeakMemory()
    probes = (watch,) if work.device == "cpu" else (memory, watch)
    run(work.measured(steps, *probes, valid=valid), False)
    return watch.taken / steps * 1e3, memory.mebibytes


def _waits(work: Work, steps: int, valid: bool, run: Contestant) -> float:
    waits = Waits()
    run(work.measured(steps, waits, valid=valid), False)
    return waits.count / steps


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda:0", help="cpu: small, to see whether it runs")
    options = made.parse_args(words)
    on_gpu = options.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print("There is no GPU here; --device cpu runs small models on the CPU.")
        return
    report = Report(options)
    with quiet(threads=None):
        for name, (work, steps) in tasks(options.device).items():
            rows = table(work, steps, options.rounds)
            report.table(f"A step of {name}, batches of {work.shape}, bf16", rows)
            rows = table(work, steps, options.rounds, valid=True)
            report.table(f"A batch of a validation of {name}", rows)
        rows = {kind: {"stall": figure} for kind, figure in saves(options).items()}
        report.table("A save: what it adds to the steps around it", rows)
    report.end()


def saves(options: Any) -> dict[str, Figure]:
    """Into memory where that can be, for the disk is not what is measured."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    megabytes = 3 if options.device == "cpu" else 300
    return stalls(megabytes, min(options.rounds, 5), folder, options.device)


if __name__ == "__main__":
    main()
