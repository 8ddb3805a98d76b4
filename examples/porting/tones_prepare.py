"""Makes the data: syllables with one of the four tones of Mandarin, as WAV files and JSON.

Nothing is downloaded. Every voice is synthetic: harmonics of a pitch that stays level, rises,
dips or falls. ``before/`` and ``after/`` share this file by a link, as recipes do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from speechbrain.dataio.dataio import write_audio
from torch import Tensor

SAMPLE_RATE = 8000
HARMONICS = 12
# How far the pitch is from the voice's own, in octaves, at the start, the middle and the end.
CONTOURS = {
    "level": (0.3, 0.3, 0.3),
    "rising": (-0.2, 0.0, 0.4),
    "dipping": (0.0, -0.4, 0.1),
    "falling": (0.4, 0.1, -0.4),
}


def prepare_tones(data_folder: str, sizes: Mapping[str, int], noise: float = 0.1) -> None:
    """Writes ``<split>.json`` and its WAV files, unless they are there.

    Args:
        data_folder: Where to.
        sizes: Syllables of each split, such as ``{"train": 400}``.
        noise: How loud the noise is.
    """
    for seed, (split, size) in enumerate(sizes.items()):
        annotation = Path(data_folder) / f"{split}.json"
        if not annotation.is_file():
            write_split(annotation, size, noise, torch.Generator().manual_seed(seed))


def write_split(annotation: Path, size: int, noise: float, generator: torch.Generator) -> None:
    """Writes one split, its annotation last.

    Args:
        annotation: The JSON file; the WAV files go into a folder beside it.
        size: How many syllables.
        noise: How loud the noise is.
        generator: Draws them: they are the same whatever the seed of the experiment.
    """
    wavs = annotation.with_suffix("")
    wavs.mkdir(parents=True, exist_ok=True)
    items = {}
    for number in range(size):
        tone = list(CONTOURS)[number % len(CONTOURS)]
        signal = syllable(CONTOURS[tone], noise, generator)
        name = f"{tone}_{number:04d}"
        write_audio(str(wavs / f"{name}.wav"), signal, SAMPLE_RATE)
        items[name] = {
            "wav": f"{{data_root}}/{wavs.name}/{name}.wav",
            "length": len(signal) / SAMPLE_RATE,
            "tone": tone,
        }
    # Several processes may do this at once: a reader sees a whole file or none.
    unfinished = annotation.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(items, indent=2), encoding="utf-8")
    unfinished.replace(annotation)


def syllable(
    contour: tuple[float, float, float], noise: float, generator: torch.Generator
) -> Tensor:
    """Draws a voice and a duration, and speaks.

    Args:
        contour: The pitch, as in ``CONTOURS``.
        noise: How loud the noise is.
        generator: Draws.

    Returns:
        The signal.
    """
    octave, duration, wobble = torch.rand(3, generator=generator).tolist()
    samples = int(SAMPLE_RATE * (0.25 + 0.25 * duration))
    time = torch.linspace(0, 1, samples)
    # The parabola through the three points of the contour.
    start, middle, end = contour
    slope, curvature = 4 * middle - 3 * start - end, 2 * (start + end - 2 * middle)
    bend = start + slope * time + curvature * time**2
    pitch = 110 * 2 ** (octave + bend * (0.6 + 0.6 * wobble))
    phase = 2 * torch.pi * torch.cumsum(pitch / SAMPLE_RATE, dim=0)
    voice = sum(torch.sin(n * phase) / n for n in range(1, HARMONICS + 1))
    hiss = noise * torch.randn(samples, generator=generator)
    return 0.2 * (voice * torch.sin(torch.pi * time) + hiss)
