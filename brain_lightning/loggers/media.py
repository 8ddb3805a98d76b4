"""Logs audio and figures to Lightning's loggers."""

from __future__ import annotations

import tempfile
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_audio(logger: Logger, name: str, value: Any, sample_rate: int, position: int) -> bool:
    """Logs audio to TensorBoard, W&B or MLflow, or as a file to a logger's folder.

    Args:
        logger: The logger.
        name: Name of the audio.
        value: Samples between -1 and 1.
        sample_rate: Number of samples per second.
        position: Epoch.

    Returns:
        False if the logger has no folder, so nothing was logged.
    """
    samples = torch.as_tensor(value).detach().cpu().float().flatten()
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_audio(name, samples, position, sample_rate=sample_rate)
    elif isinstance(logger, WandbLogger):
        logger.log_audio(name, [samples.numpy()], position, sample_rate=[sample_rate])
    else:
        write = partial(_write_wav, samples, sample_rate)
        return _log_file(logger, write, "audio", name, f"{position}.wav")
    return True


def log_figure(logger: Logger, name: str, figure: Figure, position: int) -> bool:
    """Logs a figure to TensorBoard, W&B or MLflow, or as a file to a logger's folder.

    Args:
        logger: The logger.
        name: Name of the figure.
        figure: The figure.
        position: Epoch.

    Returns:
        False if the logger has no folder, so nothing was logged.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, position)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], position)
    else:
        return _log_file(logger, figure.savefig, "figures", name, f"{position}.png")
    return True


def spectrogram(value: Any) -> Figure:
    """Draws a spectrogram, as SpeechBrain's ``plot_spectrogram``.

    Args:
        value: Array with two dimensions after ``squeeze``. The last one is time.

    Returns:
        The figure, which is not registered with pyplot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10), layout="tight")
    axes = figure.subplots()
    pixels = torch.as_tensor(value).detach().cpu().float().squeeze().numpy()
    figure.colorbar(axes.imshow(pixels, aspect="auto", origin="lower"))
    return figure


def _log_file(logger: Logger, write: Callable[[Path], None], *parts: str) -> bool:
    """Writes a file to the folder of a logger. Returns False if it has no folder."""
    if isinstance(logger, MLFlowLogger):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, parts[-1])
            write(path)
            logger.experiment.log_artifact(logger.run_id, str(path), "/".join(parts[:-1]))
        return True
    if logger.log_dir is None:
        return False
    path = Path(logger.log_dir, *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return True


def _write_wav(samples: torch.Tensor, sample_rate: int, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        # One channel, two bytes per sample. wave writes the number of samples at the end.
        file.setparams((1, 2, sample_rate, 0, "NONE", "not compressed"))
        file.writeframes((samples.clamp(-1, 1) * 32767).short().numpy().tobytes())
