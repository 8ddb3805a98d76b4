"""The code of SpeechBrain's Brain class tutorial, block by block, on our Brain and theirs.

Its text is ``docs/tutorials/basics/brain-class.ipynb`` of SpeechBrain 1.1.2, and written for
the API of 0.5.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import Checkpointer as TheirCheckpointer
from torch.utils.data import DataLoader
from tqdm import tqdm

import brain_lightning
from brain_lightning import Checkpointer, if_main_process, patch_speechbrain, run_on_main
from tests.support.brains import all_equal, weights

# SpeechBrain's own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")
CPU = {"device": "cpu"}


@pytest.fixture(params=["ours", "patched"])
def sb(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The names that the tutorial uses from ``sb``."""
    if request.param == "ours":
        yield brain_lightning
    else:
        with patch_speechbrain():
            yield speechbrain


def test_simple_brain(sb: Any) -> None:
    class SimpleBrain(sb.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch["input"])

        def compute_objectives(self, predictions, batch, stage):
            return torch.nn.functional.l1_loss(predictions, batch["target"])

    model = torch.nn.Linear(in_features=10, out_features=10)
    opt_class = lambda x: torch.optim.SGD(x, 0.1)  # noqa: E731
    brain = SimpleBrain({"model": model}, opt_class=opt_class, run_opts=CPU)
    before = weights(brain)
    data = [{"input": torch.rand(10, 10), "target": torch.rand(10, 10)}]
    brain.fit(range(10), data)
    assert not all_equal(before, weights(brain))
    assert brain.optimizer_step == 10


def test_opt_class_and_hparams_arguments(sb: Any) -> None:
    class SimpleBrain(sb.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch["input"])

        def compute_objectives(self, predictions, batch, stage):
            term1 = torch.nn.functional.l1_loss(predictions, batch["target1"])
            term2 = torch.nn.functional.mse_loss(predictions, batch["target2"])
            return self.hparams.weight1 * term1 + self.hparams.weight2 * term2

    yaml = "optimizer: !name:torch.optim.Adam\n    lr: 0.1\n"
    hparams = {"weight1": 0.7, "weight2": 0.3}
    model = torch.nn.Linear(in_features=10, out_features=10)
    brain = SimpleBrain(
        modules={"model": model},
        opt_class=load_hyperpyyaml(yaml)["optimizer"],
        hparams=hparams,
        run_opts=CPU,
    )
    before = weights(brain)
    data = [{
        "input": torch.rand(10, 10),
        "target1": torch.rand(10, 10),
        "target2": torch.rand(10, 10),
    }]  # fmt: skip
    brain.fit(range(10), data)
    assert not all_equal(before, weights(brain))


def hooks(sb: Any) -> Any:
    """``on_fit_start`` and ``fit_batch``, as the tutorial shows them."""
    Stage = sb.Stage  # noqa: N806

    class Hooks(sb.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch[0])

        def compute_objectives(self, predictions, batch, stage):
            return torch.nn.functional.mse_loss(predictions, batch[1])

        def on_fit_start(self):
            self._compile_jit()
            self._wrap_distributed()
            self.init_optimizers()
            if self.checkpointer is not None:
                self.checkpointer.recover_if_possible(device=torch.device(self.device))

        def fit_batch(self, batch):
            outputs = self.compute_forward(batch, Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, Stage.TRAIN)
            loss.backward()
            if self.check_gradients(loss):
                self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach().cpu()

        def on_stage_end(self, stage, stage_loss, epoch=None):
            vars(self).setdefault("losses", []).append((stage.name, stage_loss, epoch))

    return Hooks


def loops(sb: Any) -> Any:  # noqa: C901
    """The blocks of ``fit``: both loops, and the code around them."""
    Stage = sb.Stage  # noqa: N806

    class Loops(hooks(sb)):
        def begin(self, train_set, valid_set, progressbar, train_loader_kwargs, valid_kwargs):
            if not isinstance(train_set, DataLoader):
                train_set = self.make_dataloader(
                    train_set, stage=sb.Stage.TRAIN, **train_loader_kwargs
                )
            if valid_set is not None and not isinstance(valid_set, DataLoader):
                valid_set = self.make_dataloader(
                    valid_set, stage=sb.Stage.VALID, ckpt_prefix=None, **valid_kwargs
                )
            self.on_fit_start()
            if progressbar is None:
                progressbar = self.progressbar
            return train_set, valid_set, progressbar and if_main_process()

        def train_loop(self, train_set, epoch, enable):
            self.on_stage_start(Stage.TRAIN, epoch)
            self.modules.train()
            self.nonfinite_count = 0
            if self.train_sampler is not None and hasattr(self.train_sampler, "set_epoch"):
                self.train_sampler.set_epoch(epoch)
            last_ckpt_time = time.time()
            with tqdm(
                train_set, initial=self.step, dynamic_ncols=True, disable=not enable,
            ) as t:  # fmt: skip
                for batch in t:
                    self.step += 1
                    loss = self.fit_batch(batch)
                    self.avg_train_loss = self.update_average(loss, self.avg_train_loss)
                    t.set_postfix(train_loss=self.avg_train_loss)
                    if self.debug and self.step == self.debug_batches:
                        break
                    if (
                        self.checkpointer is not None
                        and self.ckpt_interval_minutes > 0
                        and time.time() - last_ckpt_time >= self.ckpt_interval_minutes * 60.0
                    ):
                        run_on_main(self._save_intra_epoch_ckpt)
                        last_ckpt_time = time.time()
            self.on_stage_end(Stage.TRAIN, self.avg_train_loss, epoch)
            self.avg_train_loss = 0.0
            self.step = 0

        def valid_loop(self, valid_set, epoch, enable):
            if valid_set is not None:
                self.on_stage_start(Stage.VALID, epoch)
                self.modules.eval()
                avg_valid_loss = 0.0
                with torch.no_grad():
                    for batch in tqdm(valid_set, dynamic_ncols=True, disable=not enable):
                        self.step += 1
                        loss = self.evaluate_batch(batch, stage=Stage.VALID)
                        avg_valid_loss = self.update_average(loss, avg_valid_loss)
                        if self.debug and self.step == self.debug_batches:
                            break
                self.step = 0
                run_on_main(self.on_stage_end, args=[Stage.VALID, avg_valid_loss, epoch])

    return Loops


def of_its_own_loops(sb: Any) -> Any:
    class Own(loops(sb)):
        def fit(
            self, epoch_counter, train_set, valid_set=None, progressbar=None,
            train_loader_kwargs={}, valid_loader_kwargs={},  # noqa: B006
        ):  # fmt: skip
            train_set, valid_set, enable = self.begin(
                train_set, valid_set, progressbar, train_loader_kwargs, valid_loader_kwargs
            )
            for epoch in epoch_counter:
                self.train_loop(train_set, epoch, enable)
                self.valid_loop(valid_set, epoch, enable)
                if self.debug and epoch == self.debug_epochs:
                    break

    return Own


def of_parts(sb: Any) -> Any:
    class Parts(loops(sb)):
        def _fit_train(self, train_set, epoch, enable):
            self.train_loop(train_set, epoch, enable)

        def _fit_valid(self, valid_set, epoch, enable):
            self.valid_loop(valid_set, epoch, enable)

    return Parts


def fitted(cls: Any, folder: Path, checkpointer: Any = Checkpointer, **run_opts: Any) -> Any:
    """A Brain that is killed after an epoch, and a Brain that resumes from its checkpoint."""
    data = torch.utils.data.TensorDataset(*torch.randn(2, 12, 4))
    for last in (2, 4):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        brain = cls(
            {"model": model}, lambda x: torch.optim.Adam(x, 0.1), {},
            {**CPU, "noprogressbar": True, **run_opts}, checkpointer(folder, {"model": model}),
        )  # fmt: skip
        before = weights(brain)
        brain.fit(
            range(1, last), data, data, train_loader_kwargs={"batch_size": 3},
            valid_loader_kwargs={"batch_size": 4},
        )  # fmt: skip
        brain.checkpointer.save_checkpoint({"loss": brain.losses[-1][1]})
    assert not all_equal(before, weights(brain))
    assert brain.evaluate(data, min_key="loss") > 0
    return brain


@pytest.mark.parametrize("checkpointer", [Checkpointer, TheirCheckpointer])
def test_on_fit_start_and_fit_batch_and_the_loops_written_out(
    sb: Any, checkpointer: Any, tmp_path: Path
) -> None:
    """A Trainer gives bitwise identical results to the tutorial's loops."""
    for run_opts in ({}, {"debug": True, "debug_persistently": True}):
        folder = tmp_path / str(len(run_opts))
        torch.manual_seed(0)
        brain = fitted(hooks(sb), folder / "hooks", checkpointer, **run_opts)
        torch.manual_seed(0)
        own = fitted(of_its_own_loops(sb), folder / "own", **run_opts)
        assert brain.losses == own.losses
        assert all_equal(weights(brain), weights(own))


def test_the_loops_as_parts(sb: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    brain = fitted(hooks(sb), tmp_path / "hooks")
    torch.manual_seed(0)
    parts = fitted(of_parts(sb), tmp_path / "parts")
    assert brain.losses == parts.losses
    assert all_equal(weights(brain), weights(parts))


def test_jit_module_keys_alone_are_compiled(sb: Any) -> None:
    """``_compile_jit`` of SpeechBrain 0.5 needs no ``jit``, which came with ``_compile``."""
    modules = {"model": torch.nn.Linear(4, 4), "other": torch.nn.Linear(4, 4), "none": None}
    brain = hooks(sb)(modules, run_opts={**CPU, "jit_module_keys": ["model"]})
    brain._compile()
    assert not isinstance(brain.modules["model"], torch.jit.ScriptModule)
    brain._compile_jit()
    assert isinstance(brain.modules["model"], torch.jit.ScriptModule)
    assert not isinstance(brain.modules["other"], torch.jit.ScriptModule)
