"""A SpeechBrain recipe, as people write them; nothing in it knows of a Trainer."""

import os
import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml


class ToyBrain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return self.hparams.loss_scale * torch.nn.functional.mse_loss(predictions, batch[1])

    def on_stage_end(self, stage, stage_loss, epoch=None):
        print(f"{stage.name} {epoch} {stage_loss:.6f}")


def prepare(folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "prepared.txt"), "a", encoding="utf-8") as file:
        file.write(f"rank {os.environ.get('RANK')}\n")


if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.run_on_main(prepare, [hparams["output_folder"]])
    brain = ToyBrain(hparams["modules"], hparams["opt_class"], hparams, run_opts)
    data = torch.utils.data.TensorDataset(*hparams["data"])
    brain.fit(
        hparams["epoch_counter"],
        data,
        data,
        train_loader_kwargs={"batch_size": 4, "shuffle": True},
        valid_loader_kwargs={"batch_size": 5},
    )
    loss = brain.evaluate(data, test_loader_kwargs={"batch_size": 5})
    name = f"rank{brain.rank if brain.distributed_launch else 0}.pt"
    result = {
        "weights": brain.modules.state_dict(),
        "loss": loss,
        "step": brain.optimizer_step,
    }
    torch.save(result, os.path.join(hparams["output_folder"], name))
