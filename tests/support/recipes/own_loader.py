"""A recipe that makes its training loader itself, and a process group if told to."""

import os
import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

import brain_lightning


def prepare(folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "prepared.txt"), "a", encoding="utf-8") as file:
        file.write(f"rank {os.environ.get('RANK')}\n")


def train(base, hparams, run_opts):
    class OwnLoader(base):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch[0])

        def compute_objectives(self, predictions, batch, stage):
            if stage == sb.Stage.TRAIN:
                seen.extend(batch[0].sum(dim=1).tolist())
            return torch.nn.functional.mse_loss(predictions, batch[1])

    seen = []
    brain = OwnLoader(hparams["modules"], hparams["opt_class"], hparams, run_opts)
    bias = hparams["model"][0].bias.detach().clone()
    data = torch.utils.data.TensorDataset(*hparams["data"])
    loader = brain.make_dataloader(data, sb.Stage.TRAIN, batch_size=4, shuffle=True)
    brain.fit(hparams["epoch_counter"], loader, data, valid_loader_kwargs={"batch_size": 5})
    loss = brain.evaluate(data, test_loader_kwargs={"batch_size": 5})
    moved = not torch.equal(bias, hparams["model"][0].bias)
    weights = brain.modules.state_dict()
    return {"weights": weights, "loss": loss, "seen": seen, "moved": moved}


if __name__ == "__main__":
    # Nothing, unless there is a group already.
    sb.utils.distributed.ddp_barrier()
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    if "MAKES_ITS_GROUP" in os.environ:
        sb.utils.distributed.ddp_init_group(run_opts)
    learned = {}
    for base in (sb.Brain, brain_lightning.Brain):
        with open(hparams_file, encoding="utf-8") as fin:
            hparams = load_hyperpyyaml(fin, overrides)
        sb.utils.distributed.run_on_main(prepare, [hparams["output_folder"]])
        learned[base.__module__.partition(".")[0]] = train(base, hparams, run_opts)
    rank = torch.distributed.get_rank()
    torch.save(learned, os.path.join(hparams["output_folder"], f"rank{rank}.pt"))
