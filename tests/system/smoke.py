"""A recipe for an installed wheel: ``tests/system/wheel.sh`` runs it elsewhere."""

import sysconfig
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from torch.utils.data import DataLoader, TensorDataset

import brain_lightning
from brain_lightning import Brain, parse_arguments


class Regression(Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return torch.nn.functional.mse_loss(predictions, batch[1])


package = Path(brain_lightning.__file__).parent
assert package.parent == Path(sysconfig.get_paths()["purelib"]), package
assert (package / "py.typed").exists()

hparams_file, run_opts, overrides = parse_arguments()
with open(hparams_file) as file:
    hparams = load_hyperpyyaml(file, overrides)
inputs = torch.rand(32, 4)
data = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8)
brain = Regression(
    hparams["modules"],
    hparams["opt_class"],
    hparams,
    run_opts,
    checkpointer=hparams["checkpointer"],
)
before = brain.evaluate(data)
brain.fit(hparams["epoch_counter"], data, data)
after = brain.evaluate(data)
print(f"loss {before:.3f} before, {after:.3f} after {brain.optimizer_step} steps")
assert after < before
