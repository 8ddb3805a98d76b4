"""Trains with DDP and with FSDP2 on several ranks, saves, interrupts and resumes.

Usage: ``torchrun --nproc_per_node=2 -m tests.fsdp2.saving FOLDER [ROW...]``
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from brain_lightning import (
    Brain,
    Checkpointer,
    Stage,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
    to_lightning,
)
from brain_lightning.distributed import communication
from brain_lightning.distributed.communication import ddp_barrier, if_main_process, world_size
from brain_lightning.fsdp2.tensors import like, whole
from brain_lightning.protocol import parameters_of
from tests.parity.recipes import CLASSES, FEATURES, classifier, dataset
from tests.parity.sides import OURS, SPEECHBRAIN
from tests.support.brains import trainer_with
from tests.support.environment import seed_everything  # Makes SpeechBrain importable.
from tests.support.sharded import wholes

STRATEGIES = ("ddp", "fsdp2")
SAVERS = ("ours", "async", "speechbrain", "lightning")
# With 28 items, each of two ranks has 7 batches per epoch. The last one is in no full window.
ITEMS, EPOCHS, WINDOW, INTERVAL = 28, 2, 2, 3
CUT_IN = (2, 4)
TIMEOUT = datetime.timedelta(seconds=90)

Learned = dict[str, Tensor]


class Cut(RuntimeError):  # noqa: N818  not a real error
    """Interrupts a run on all ranks."""


def cuts(hook: str) -> dict[str, Any]:
    """Returns hooks of a Brain that raises within a batch, after a checkpoint was saved."""

    def check(self: Any) -> None:
        if (self.hparams.counter.current, self.step) == CUT_IN:
            raise Cut

    def on_fit_batch_start(self: Any, *_: Any) -> None:
        check(self)

    def init_optimizers(self: Any) -> None:
        Brain.init_optimizers(self)
        self.optimizer.register_step_post_hook(lambda *_: check(self))

    return {hook: {f.__name__: f for f in (on_fit_batch_start, init_optimizers)}[hook]}


def saves(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
    """Implements ``on_stage_end`` of a recipe that saves checkpoints."""
    if stage.name == "VALID" and self.checkpointer is not None:
        self.checkpointer.save_and_keep_only({"loss": stage_loss}, num_to_keep=9)


def adam(parameters: Any) -> torch.optim.Adam:
    """Returns an Adam whose large eps does not amplify rounding errors of gradients."""
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3)


@register_checkpoint_hooks
class Adapted(nn.Sequential):
    """Has a custom saver that runs on rank 0 only, like SpeechBrain's AdaptedModel."""

    @mark_as_saver
    def saver(self, path: Path) -> None:
        torch.save({"own": self.state_dict()}, path)

    @mark_as_loader
    def loader(self, path: Path, end_of_epoch: bool) -> None:
        self.load_state_dict(torch.load(path)["own"])


def creates_optimizer(self: Any) -> None:
    """Implements ``on_fit_start`` of a recipe that creates its optimizer there."""
    self._compile()
    self._wrap_distributed()
    self.optimizer = adam(self.modules.parameters())
    self.optimizers_dict = {"own": self.optimizer}
    self.checkpointer.add_recoverable("optimizer", self.optimizer)
    self.checkpointer.add_recoverable("encoder", self.modules.encoder)
    self.checkpointer.recover_if_possible()


def make(
    folder: Path, saver: str = "ours", side: Any = OURS, epochs: int = EPOCHS,
    norm: Any = nn.BatchNorm1d, window: int = WINDOW, entry: Any = nn.Sequential, **hooks: Any,
) -> Any:  # fmt: skip
    """Creates a Brain with two entries, whose sizes are not divisible by the number of ranks.

    It saves a list of its entries, a part of one entry, and its optimizer.
    """
    seed_everything(3)
    first = nn.Linear(FEATURES, 7, bias=False)
    encoder = entry(first, norm(7), nn.Dropout(0.3), nn.Tanh())
    entries = {"encoder": encoder, "head": nn.Linear(7, CLASSES)}
    counter = side.EpochCounter(epochs)
    model = nn.ModuleList(entries.values())
    recoverables = {"model": model, "part": encoder[0], "counter": counter}
    theirs = sys.modules["speechbrain.utils.checkpoints"].Checkpointer
    checkpointer: Any = (theirs if saver == "speechbrain" else Checkpointer)(
        folder, recoverables
    )
    checkpointer.async_save = saver == "async"
    return classifier(side, **{"on_stage_end": saves, **hooks})(
        entries, adam, {"counter": counter},
        {
            "device": "cpu", "distributed_backend": "gloo", "noprogressbar": True,
            "grad_accumulation_factor": window, "ckpt_interval_steps": INTERVAL,
        },
        None if saver == "lightning" else checkpointer,
    )  # fmt: skip


def fit(
    brain: Any, strategy: str | None, folder: Path | None = None, path: Any = None
) -> Learned:
    """Trains, and returns weights, buffers and optimizer state.

    Without a strategy it uses SpeechBrain's own loop, otherwise a Trainer. If a folder is
    given, the Trainer saves to it.
    """
    if strategy is None:
        sizes = {
            "train_loader_kwargs": {"batch_size": 2}, "valid_loader_kwargs": {"batch_size": 5}
        }  # fmt: skip
        brain.fit(brain.hparams.counter, dataset(ITEMS), dataset(ITEMS), **sizes)
        return learned(brain)
    callbacks: list[Any] = []
    if folder is not None:
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        callbacks = [saver, OnExceptionCheckpoint(folder, "cut")]
    trainer = trainer_with(
        *callbacks, strategy=strategy, devices=world_size(), max_epochs=-1,
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    module = to_lightning(brain, epoch_counter=brain.hparams.counter)
    loaders = (
        brain.make_dataloader(dataset(ITEMS), stage, ckpt_prefix=None, batch_size=size)
        for stage, size in ((Stage.TRAIN, 2), (Stage.VALID, 5))
    )
    trainer.fit(module, *loaders, ckpt_path=path)
    return learned(brain)


def learned(brain: Any) -> Learned:
    """Returns weights, buffers and the state of the optimizer."""
    found = dict(brain.modules.state_dict(keep_vars=True))
    for index, parameter in enumerate(parameters_of(brain.optimizer)):
        state = brain.optimizer.state[parameter]
        found |= {f"{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    found["steps"] = torch.tensor(brain.optimizer_step)
    return {n.replace(".module.", "."): tensor for n, tensor in wholes(found).items()}


def cut(
    folder: Path, strategy: str, saver: str = "ours", hook: str = "on_fit_batch_start"
) -> None:
    """Trains until the run is interrupted."""
    brain = make(folder, saver, **cuts(hook))
    with pytest.raises(Cut):
        fit(brain, strategy, folder if saver == "lightning" else None)
    if saver == "async":
        # The checkpoint is still being written.
        brain.checkpointer.wait()


def copied(folder: Path, name: str) -> Path:
    """Returns a copy of a folder, from which another run resumes."""
    ddp_barrier()
    copy = folder.with_name(f"{folder.name}-{name}")
    if if_main_process():
        shutil.copytree(folder, copy)
    ddp_barrier()
    return copy


# ------------------------------------------------------------------------------- rows


def saved(folder: Path) -> dict[Any, Learned]:
    """Trains and saves with each saver."""
    rows = {}
    for saver, strategy in itertools.product(SAVERS, STRATEGIES):
        own = folder / f"{saver}-{strategy}"
        of_trainer = own if saver == "lightning" else None
        rows[saver, strategy] = fit(make(own, saver, epochs=1, window=1), strategy, of_trainer)
    return rows


def resumed(folder: Path) -> dict[Any, Learned]:
    """Interrupts a run within a window, and resumes it with the same or another strategy."""
    rows = {"whole": fit(make(folder / "whole"), "fsdp2")}
    for strategy, saver in (("ddp", "ours"), ("fsdp2", "async")):
        own = folder / f"cut-{strategy}"
        cut(own, strategy, saver)
        for other in STRATEGIES:
            if "fsdp2" in (strategy, other):
                rows[strategy, other] = fit(make(copied(own, other), saver), other)
    cut(folder / "cut-speechbrain", "fsdp2", "speechbrain")
    rows["speechbrain"] = fit(make(folder / "cut-speechbrain", "speechbrain"), "fsdp2")
    return rows


def moved(folder: Path) -> dict[Any, Learned]:
    """Resumes runs that other processes have interrupted in ``resumed``."""
    strategies = STRATEGIES if torch.distributed.is_initialized() else ("auto",)
    return {
        (first, second): fit(
            make(copied(folder / f"cut-{first}", f"{world_size()}{second}")), second
        )
        for first in STRATEGIES
        for second in strategies
    }


def from_exceptions(folder: Path) -> dict[Any, Learned]:
    """Interrupts a run after an optimizer step, and resumes from Lightning's checkpoint."""
    own = folder / "batch"
    cut(own, "fsdp2", "lightning", "init_optimizers")
    return {
        ("fsdp2", other): fit(make(own, "lightning"), other, path=own / "cut.ckpt")
        for other in STRATEGIES
    }


def native(folder: Path) -> dict[Any, Learned]:
    """Resumes a run of SpeechBrain's own loop on a Trainer, and then in the loop again."""
    rows = {}
    options = {"saver": "speechbrain", "side": SPEECHBRAIN, "norm": nn.LayerNorm, "window": 1}
    fit(make(folder / "native", epochs=1, **options), None)
    for strategy in STRATEGIES:
        own = copied(folder / "native", strategy)
        rows[strategy] = fit(make(own, epochs=2, **options), strategy)
        rows["back", strategy] = fit(make(own, epochs=3, **options), None)
    return rows


def custom(folder: Path) -> dict[Any, Learned]:
    """Uses a module with a custom saver, and an optimizer created before recovering."""
    rows = {}
    for saver, strategy in (("ours", "ddp"), ("ours", "fsdp2"), ("speechbrain", "fsdp2")):
        for epochs in (1, 2):
            options = {"entry": Adapted, "window": 1, "on_fit_start": creates_optimizer}
            brain = make(
                folder / f"custom-{saver}-{strategy}", saver, epochs=epochs, **options
            )
            rows[saver, strategy] = fit(brain, strategy)
    return rows


def listed(folder: Path) -> dict[Any, Any]:
    """Returns the files that each rank finds in SpeechBrain's checkpoint after a save.

    Rank 0 writes the last file only when rank 1 waits for it in a collective. If rank 1 does
    not wait, rank 0 writes the last file only after rank 1 has listed the files.
    """
    rows: dict[Any, Any] = {}
    hooks = {
        "brain_lightning": {}, "encoder": {"on_fit_start": creates_optimizer, "entry": Adapted}
    }  # fmt: skip
    for name, of in hooks.items():
        order = _OrderOfSaves(folder / f"{name}.store")

        def lists(
            self: Any, stage: Any, *_: Any, order: Any = order, name: Any = name
        ) -> None:
            if stage.name == "VALID":
                recoverables = self.checkpointer.recoverables
                # SpeechBrain's own hooks wait for rank 0, so the last hook has to be
                # brain_lightning's.
                recoverables[name] = recoverables.pop(name)
                with order.of_last_file(name):
                    self.checkpointer.save_checkpoint()
                    found = self.checkpointer.list_checkpoints()
                rows[name] = sorted(file for each in found for file in each.paramfiles)

        brain = make(folder / name, "speechbrain", epochs=1, on_stage_end=lists, **of)
        fit(brain, "fsdp2")
    return rows


class _OrderOfSaves:
    """Delays the last file of a checkpoint on rank 0 until rank 1 waits or has listed files.

    Args:
        path: Path of the file through which the ranks notify each other.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._store = torch.distributed.FileStore(str(path), world_size())
        self._collectives = 0

    @contextmanager
    def of_last_file(self, name: str) -> Iterator[None]:
        """Context manager in which the save of an object is delayed.

        Args:
            name: Key of the last recoverable.
        """
        gather, save = communication.gather, torch.save

        def counted_gather(value: Any) -> Any:
            self._notify()
            self._collectives += 1
            return gather(value)

        def delayed_save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(path, (str, Path)) and Path(path).stem == name:
                self._store.wait([str(self._collectives)], TIMEOUT)
            save(obj, path, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(communication, "gather", counted_gather)
            patch.setattr(torch, "save", delayed_save)
            yield
        self._notify()

    def _notify(self) -> None:
        """Notifies rank 0 that rank 1 starts its next collective, or has listed the files."""
        if not if_main_process():
            self._store.set(str(self._collectives), "")


def failures(folder: Path) -> dict[Any, Any]:
    """Returns the error on each rank if one rank cannot save, and the saved checkpoints."""
    brain = make(folder / "failures", epochs=1)
    fit(brain, "fsdp2")
    rows: dict[Any, Any] = {}
    checkpointer = brain.checkpointer
    for name, rank in itertools.product(("part", "counter"), (0, 1)):
        checkpointer.custom_save_hooks[name] = fails_in(rank)
        try:
            checkpointer.save_checkpoint(name="failed")
        except Exception as error:  # noqa: BLE001  compared by the test
            rows[name, rank] = repr(error)
        del checkpointer.custom_save_hooks[name]
    weight = brain.modules.head.weight
    # Rank 1 has the last row.
    before = whole(weight.detach()).clone()
    with torch.no_grad():
        shard = weight.to_local()
        if shard.numel() and not if_main_process():
            shard[-1] = torch.nan
    rows["not finite"] = checkpointer.save_checkpoint(name="nan")
    with torch.no_grad():
        weight.copy_(like(before, weight))
    checkpointer.save_checkpoint(name="good")
    rows["saved"] = sorted(path.name for path in (folder / "failures").iterdir())
    return rows


def fails_in(rank: int) -> Any:
    def hook(obj: Any, path: Path) -> None:
        if torch.distributed.get_rank() == rank:
            raise OSError(28, "No space left on device")

    return hook


ROWS = (saved, resumed, from_exceptions, native, custom, listed, failures)


def main(folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # If one rank fails, the other rank must not hang.
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    rows: dict[str, Any] = {}
    for row in (*ROWS, moved):
        if row.__name__ in names or (not names and row in ROWS):
            try:
                rows[row.__name__] = row(Path(folder))
            except Exception:  # noqa: BLE001  the test shows any error
                rows[row.__name__] = traceback.format_exc()
                print(rows[row.__name__])
    torch.save(rows, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
