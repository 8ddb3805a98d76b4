"""One of several processes: trains under DDP and in shards, saves, is cut, and resumes.

``torchrun --nproc_per_node=2 -m tests.fsdp2.saving FOLDER [ROW...]``
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
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
from brain_lightning.distributed.communication import ddp_barrier, if_main_process, world_size
from brain_lightning.fsdp2.tensors import like, whole
from brain_lightning.protocol import parameters_of
from tests.parity.recipes import CLASSES, FEATURES, classifier, dataset
from tests.parity.sides import OURS, SPEECHBRAIN
from tests.support.brains import trainer_with
from tests.support.environment import seed_everything  # First: SpeechBrain is importable.
from tests.support.sharded import wholes

STRATEGIES = ("ddp", "fsdp2")
SAVERS = ("ours", "async", "speechbrain", "lightning")
# With 28 items an epoch has 7 batches in each of two processes: the last is in no window.
ITEMS, EPOCHS, WINDOW, INTERVAL = 28, 2, 2, 3
CUT_IN = (2, 4)

Learned = dict[str, Tensor]


class Cut(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run here, in all processes."""


def cuts(hook: str) -> dict[str, Any]:
    """A Brain that fails in a hook, within a batch after a save."""

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
    """``on_stage_end`` of a recipe."""
    if stage.name == "VALID" and self.checkpointer is not None:
        self.checkpointer.save_and_keep_only({"loss": stage_loss}, num_to_keep=9)


def adam(parameters: Any) -> torch.optim.Adam:
    """With which a rounding error of a gradient stays as small."""
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3)


@register_checkpoint_hooks
class Adapted(nn.Sequential):
    """Saved in the main process alone, its own way, as SpeechBrain's AdaptedModel is."""

    @mark_as_saver
    def saver(self, path: Path) -> None:
        torch.save({"own": self.state_dict()}, path)

    @mark_as_loader
    def loader(self, path: Path, end_of_epoch: bool) -> None:
        self.load_state_dict(torch.load(path)["own"])


def begins_itself(self: Any) -> None:
    """``on_fit_start`` of a recipe that makes its optimizer there."""
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
    """A Brain of two entries, whose parameters no number of processes divides.

    It saves a list of its entries, a part of one, and its optimizer.
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
    """Trains; what was learned.

    In SpeechBrain's own loop where there is no strategy, else on a Trainer, which saves to
    a folder if there is one.
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
    """Weights, buffers and the state of the optimizer."""
    found = dict(brain.modules.state_dict(keep_vars=True))
    for index, parameter in enumerate(parameters_of(brain.optimizer)):
        state = brain.optimizer.state[parameter]
        found |= {f"{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    found["steps"] = torch.tensor(brain.optimizer_step)
    return {n.replace(".module.", "."): tensor for n, tensor in wholes(found).items()}


def cut(
    folder: Path, strategy: str, saver: str = "ours", hook: str = "on_fit_batch_start"
) -> None:
    """Trains until it is cut."""
    brain = make(folder, saver, **cuts(hook))
    with pytest.raises(Cut):
        fit(brain, strategy, folder if saver == "lightning" else None)
    if saver == "async":
        # It is on its way still.
        brain.checkpointer.wait()


def copied(folder: Path, name: str) -> Path:
    """A copy for another run, which goes on there."""
    ddp_barrier()
    copy = folder.with_name(f"{folder.name}-{name}")
    if if_main_process():
        shutil.copytree(folder, copy)
    ddp_barrier()
    return copy


# ------------------------------------------------------------------------------- rows


def saved(folder: Path) -> dict[Any, Learned]:
    """What is saved by each saver."""
    rows = {}
    for saver, strategy in itertools.product(SAVERS, STRATEGIES):
        own = folder / f"{saver}-{strategy}"
        of_trainer = own if saver == "lightning" else None
        rows[saver, strategy] = fit(make(own, saver, epochs=1, window=1), strategy, of_trainer)
    return rows


def resumed(folder: Path) -> dict[Any, Learned]:
    """Cut within a window under one strategy, and resumed under another or the same."""
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
    """Cut by other processes, in ``resumed``, and resumed by these."""
    strategies = STRATEGIES if torch.distributed.is_initialized() else ("auto",)
    return {
        (first, second): fit(
            make(copied(folder / f"cut-{first}", f"{world_size()}{second}")), second
        )
        for first in STRATEGIES
        for second in strategies
    }


def from_exceptions(folder: Path) -> dict[Any, Learned]:
    """Cut when the optimizer has stepped in a batch, and resumed from Lightning's file."""
    own = folder / "batch"
    cut(own, "fsdp2", "lightning", "init_optimizers")
    return {
        ("fsdp2", other): fit(make(own, "lightning"), other, path=own / "cut.ckpt")
        for other in STRATEGIES
    }


def native(folder: Path) -> dict[Any, Learned]:
    """From SpeechBrain's own loop, by its Brain on a Trainer, and back."""
    rows = {}
    options = {"saver": "speechbrain", "side": SPEECHBRAIN, "norm": nn.LayerNorm, "window": 1}
    fit(make(folder / "native", epochs=1, **options), None)
    for strategy in STRATEGIES:
        own = copied(folder / "native", strategy)
        rows[strategy] = fit(make(own, epochs=2, **options), strategy)
        rows["back", strategy] = fit(make(own, epochs=3, **options), None)
    return rows


def odd(folder: Path) -> dict[Any, Learned]:
    """A module with its own saver, an optimizer that a recipe makes before it recovers."""
    rows = {}
    for saver, strategy in (("ours", "ddp"), ("ours", "fsdp2"), ("speechbrain", "fsdp2")):
        for epochs in (1, 2):
            options = {"entry": Adapted, "window": 1, "on_fit_start": begins_itself}
            brain = make(folder / f"odd-{saver}-{strategy}", saver, epochs=epochs, **options)
            rows[saver, strategy] = fit(brain, strategy)
    return rows


def slow(folder: Path) -> dict[Any, Any]:
    """The files in SpeechBrain's checkpoints once saved, where the main process is slow."""
    rows: dict[Any, Any] = {}

    def lists(self: Any, stage: Any, *_: Any) -> None:
        if stage.name == "VALID":
            self.checkpointer.save_checkpoint()
            found = self.checkpointer.list_checkpoints()
            rows[brain_name] = sorted(name for each in found for name in each.paramfiles)

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.1)
        torch_save(*args, **kwargs)

    torch_save = torch.save
    hooks = {"the run": {}, "a hook": {"on_fit_start": begins_itself, "entry": Adapted}}
    for brain_name, of in hooks.items():
        brain = make(folder / brain_name, "speechbrain", epochs=1, on_stage_end=lists, **of)
        with pytest.MonkeyPatch.context() as patch:
            if if_main_process():
                patch.setattr(torch, "save", slowly)
            fit(brain, "fsdp2")
    return rows


def failures(folder: Path) -> dict[Any, Any]:
    """What each process says where one cannot save, and what is saved then."""
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
    # The last row, of which one process has its part.
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


ROWS = (saved, resumed, from_exceptions, native, odd, slow, failures)


def main(folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A rank that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=90)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    rows: dict[str, Any] = {}
    for row in (*ROWS, moved):
        if row.__name__ in names or (not names and row in ROWS):
            try:
                rows[row.__name__] = row(Path(folder))
            except Exception:  # noqa: BLE001  whatever it is, the test shows it
                rows[row.__name__] = traceback.format_exc()
                print(rows[row.__name__])
    torch.save(rows, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
