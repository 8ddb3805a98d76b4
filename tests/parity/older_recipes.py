"""Recipes written for SpeechBrain 0.5, to be run on its Brain and on ours.

``python older_recipes.py FOLDER FILE`` runs all on SpeechBrain 0.5.16, which is in that
folder, and saves what each has recorded.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

Record = dict[str, Any]


class Side(NamedTuple):
    """Where a recipe runs: a Brain class, its stages, and the names of its checkpoints."""

    Brain: Any
    Stage: Any
    checkpoints: Any


def batches(count: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, 4, 4, generator=generator)) for _ in range(count)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 4))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.05)


def recording(side: Side) -> Any:
    """A regression that records what its hooks are told."""

    class Recording(side.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return self.modules.model(batch[0])

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return 9 * (predictions - batch[1]).square().mean()

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            counts = (self.step, self.valid_step, self.optimizer_step, self.nonfinite_count)
            self.__dict__.setdefault("seen", []).append((stage.name, stage_loss, *counts))

        def on_fit_batch_end(
            self, batch: Any, outputs: Any, loss: Any, should_step: Any
        ) -> None:
            self.seen.append((loss.item(), bool(should_step)))

        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            self.__dict__.setdefault("seen", []).append(stage.name)

    return Recording


def train(brain: Any, data: Any = None, **kwargs: Any) -> Record:
    data = data or batches()
    failure = ""
    torch.manual_seed(1)
    before = [p.detach().clone() for p in brain.modules.parameters()]
    try:
        brain.fit(range(1, 4), data, batches(2), progressbar=False, **kwargs)
    except ValueError as error:
        # Its words are each side's own.
        failure = "ValueError" if "finite" in str(error) else repr(error)
    after = [p.detach().clone() for p in brain.modules.parameters()]
    assert not all(map(torch.equal, before, after)), "the weights have not moved"
    optimizers = [o for o in vars(brain).values() if isinstance(o, torch.optim.Optimizer)]
    states = [state for o in optimizers for state in o.state_dict()["state"].values()]
    return {"seen": brain.seen, "weights": after, "optimizers": states, "failure": failure}


def options(**run_opts: Any) -> Record:
    return {"device": "cpu", **run_opts}


def tutorials(side: Side) -> Any:
    class Tutorial(recording(side)):
        def fit_batch(self, batch: Any) -> Any:
            outputs = self.compute_forward(batch, side.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            loss.backward()
            if self.check_gradients(loss):
                self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach().cpu()

    return Tutorial


def tutorial(side: Side) -> Record:
    return train(tutorials(side)({"model": model()}, adam, run_opts=options()))


def clipped(side: Side) -> Record:
    return train(tutorials(side)({"model": model()}, adam, {"max_grad_norm": 0.01}, options()))


def not_clipped(side: Side) -> Record:
    return train(tutorials(side)({"model": model()}, adam, {"max_grad_norm": 0}, options()))


def with_a_loss_of_nan(side: Side) -> Record:
    data = batches()
    data[2] = (data[2][0] * torch.nan, data[2][1])
    return train(tutorials(side)({"model": model()}, adam, run_opts=options()), data)


def without_patience(side: Side) -> Record:
    data = batches()
    data[2] = data[4] = (data[2][0] * torch.inf, data[2][1])
    patience = options(nonfinite_patience=1)
    return train(tutorials(side)({"model": model()}, adam, run_opts=patience), data)


def defaults(side: Side) -> Any:
    """``fit_batch`` as SpeechBrain 0.5.16 had it: checks the loss before its backward pass."""

    class Default(recording(side)):
        def fit_batch(self, batch: Any) -> Any:
            dtype = torch.bfloat16 if self.bfloat16_mix_prec else torch.float16
            mixed = self.auto_mix_prec or self.bfloat16_mix_prec
            with torch.autocast("cpu", dtype) if mixed else nullcontext():
                outputs = self.compute_forward(batch, side.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            is_valid = self.check_gradients(loss)
            self.valid_step += is_valid
            should_step = self.valid_step % self.grad_accumulation_factor == 0
            if is_valid:
                with self.no_sync(not should_step):
                    (loss / self.grad_accumulation_factor).backward()
                if should_step:
                    self.optimizer.step()
                    self.zero_grad()
                    self.optimizer_step += 1
            self.on_fit_batch_end(batch, outputs, loss, should_step)
            return loss.detach().cpu()

    return Default


def default(side: Side) -> Record:
    return train(defaults(side)({"model": model()}, adam, run_opts=options()))


def accumulating(side: Side) -> Record:
    data = batches()
    data[3] = (data[3][0] * torch.nan, data[3][1])
    three = options(grad_accumulation_factor=3, max_grad_norm=0.5)
    return train(defaults(side)({"model": model()}, adam, run_opts=three), data)


def in_bf16(side: Side) -> Record:
    return train(
        defaults(side)({"model": model()}, adam, {"bfloat16_mix_prec": True}, options())
    )


def scaled(side: Side) -> Record:
    """As it was up to 0.5.13: windows by ``step``, gradients checked once unscaled."""

    class Scaled(recording(side)):
        def fit_batch(self, batch: Any) -> Any:
            should_step = self.step % self.grad_accumulation_factor == 0
            outputs = self.compute_forward(batch, side.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, side.Stage.TRAIN)
            with self.no_sync(not should_step):
                (loss / self.grad_accumulation_factor).backward()
            if should_step:
                if self.auto_mix_prec:
                    self.scaler.unscale_(self.optimizer)
                if self.check_gradients(loss):
                    self.optimizer.step()
                    self.optimizer_step += 1
                self.optimizer.zero_grad()
            self.on_fit_batch_end(batch, outputs, loss, should_step)
            return loss.detach().cpu()

    return train(
        Scaled({"model": model()}, adam, run_opts=options(grad_accumulation_factor=2))
    )


def without_opt_class(side: Side) -> Record:
    class Own(defaults(side)):
        def init_optimizers(self) -> None:
            self.optimizer = adam(self.modules.parameters())

    return train(Own({"model": model()}, run_opts=options(debug=True, debug_batches=4)))


def adversarial(side: Side) -> Record:
    class Adversarial(recording(side)):
        def init_optimizers(self) -> None:
            self.optimizer_g = adam(self.modules.model.parameters())
            self.optimizer_d = adam(self.modules.judge.parameters())

        def zero_grad(self, set_to_none: bool = False) -> None:
            self.optimizer_g.zero_grad(set_to_none)
            self.optimizer_d.zero_grad(set_to_none)

        def fit_batch(self, batch: Any) -> Any:
            made = self.compute_forward(batch, side.Stage.TRAIN)
            lost = (self.modules.judge(made.detach()) - self.modules.judge(batch[1])).mean()
            lost.backward()
            if self.check_gradients(lost):
                self.optimizer_d.step()
            self.zero_grad()
            loss = self.compute_objectives(made, batch, side.Stage.TRAIN)
            loss = loss - self.modules.judge(made).mean()
            loss.backward()
            if self.check_gradients(loss):
                self.optimizer_g.step()
            self.zero_grad()
            return loss.detach().cpu()

    return train(Adversarial({"model": model(), "judge": nn.Linear(4, 1)}, run_opts=options()))


def with_devices(side: Side) -> Record:
    """Load hooks that ask for a device, ``recover_if_possible(device=...)``, an average."""
    checkpoints, devices = side.checkpoints, []

    @checkpoints.register_checkpoint_hooks
    class Counter:
        count = 0

        @checkpoints.mark_as_saver
        def save(self, path: Any) -> None:
            torch.save({"count": torch.tensor(self.count)}, path)

        @checkpoints.mark_as_loader
        def load(self, path: Any, end_of_epoch: bool, device: Any) -> None:
            devices.append(str(device))
            self.count = int(torch.load(path, map_location=device)["count"])

    def load(obj: Any, path: Any, end_of_epoch: bool, device: Any = None) -> None:
        devices.append(str(device))
        obj.load_state_dict(torch.load(path, map_location=device))

    class Recovering(tutorials(side)):
        def on_fit_start(self) -> None:
            self._compile()
            self._wrap_distributed()
            self.init_optimizers()
            self.checkpointer.recover_if_possible(device=torch.device(self.device))

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage == side.Stage.VALID:
                counter.count += 1
                self.checkpointer.save_and_keep_only({"loss": stage_loss}, num_to_keep=3)

        def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
            super().on_evaluate_start(max_key=max_key, min_key=min_key)
            found = self.checkpointer.find_checkpoints(max_num_checkpoints=2)
            average = checkpoints.average_checkpoints(found, "model", device=self.device)
            self.modules.model.load_state_dict(average)

    with tempfile.TemporaryDirectory() as folder:

        def brain() -> Any:
            # Random states are resumed here alone: no dropout.
            net = model()[0::3]
            parts = {"model": net, "counter": counter, "again": nn.Linear(2, 2)}
            hooks = {"again": load}
            checkpointer = checkpoints.Checkpointer(folder, parts, custom_load_hooks=hooks)
            return Recovering({"model": net}, adam, None, options(), checkpointer)

        counter = Counter()
        first = train(brain())
        counter.count = 0
        second = brain()
        record = train(second)
        record["loss"] = second.evaluate(batches(3), min_key="loss", progressbar=False)
        second.checkpointer.load_checkpoint(
            second.checkpointer.find_checkpoint(), torch.device("cpu")
        )
        average = [p.detach().clone() for p in second.modules.parameters()]
    return {**record, "first": first, "average": average, "devices": devices,
            "count": counter.count}  # fmt: skip


RECIPES: list[Callable[[Side], Record]] = [
    tutorial, clipped, not_clipped, with_a_loss_of_nan, without_patience, default,
    accumulating, in_bf16, scaled, without_opt_class, adversarial, with_devices,
]  # fmt: skip


def main(folder: str, file: str) -> None:
    sys.path.insert(0, folder)
    import speechbrain
    from speechbrain.utils import checkpoints

    assert speechbrain.__version__ == "0.5.16"
    side = Side(speechbrain.Brain, speechbrain.Stage, checkpoints)
    torch.save({recipe.__name__: recipe(side) for recipe in RECIPES}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
