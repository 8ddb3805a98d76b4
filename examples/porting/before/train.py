"""Recognizes tones: ``python train.py hparams.yaml [--overrides]``."""

import sys

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import ddp_init_group, run_on_main
from tones_prepare import prepare_tones


class ToneBrain(sb.Brain):
    """Features, a GRU, statistics over time, a classifier."""

    def compute_forward(self, batch, stage):
        """Scores each tone."""
        batch = batch.to(self.device)
        signal, lengths = batch.sig
        features = self.modules.normalizer(self.hparams.compute_features(signal), lengths)
        frames, _ = self.modules.encoder(features, lengths=lengths)
        pooled = self.modules.dropout(self.hparams.pooling(frames, lengths))
        return self.modules.classifier(pooled).log_softmax(dim=-1)

    def compute_objectives(self, predictions, batch, stage):
        """Computes the loss and, where nothing is trained, counts the errors."""
        tones = batch.tone_encoded.data
        if stage != sb.Stage.TRAIN:
            self.error_metrics.append(batch.id, predictions, tones)
        return sb.nnet.losses.nll_loss(predictions, tones)

    def on_stage_start(self, stage, epoch=None):
        """Forgets the errors of the stage before."""
        if stage != sb.Stage.TRAIN:
            self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Reports, anneals the learning rate and saves."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        stats = {"loss": stage_loss, "error": self.error_metrics.summarize("average")}
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_annealing(stats["error"])
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": old_lr},
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(meta=stats, min_keys=["error"])
        else:
            self.hparams.train_logger.log_stats(
                {"epoch loaded": self.hparams.epoch_counter.current}, test_stats=stats
            )


def dataio_prepare(hparams):
    """Makes the datasets: signals and tones by pipelines, from the JSON annotations."""
    encoder = sb.dataio.encoder.CategoricalEncoder()
    encoder.expect_len(hparams["n_tones"])

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("tone")
    @sb.utils.data_pipeline.provides("tone", "tone_encoded")
    def tone_pipeline(tone):
        yield tone
        yield encoder.encode_label_torch(tone)

    datasets = {
        split: sb.dataio.dataset.DynamicItemDataset.from_json(
            json_path=f"{hparams['data_folder']}/{split}.json",
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, tone_pipeline],
            output_keys=["id", "sig", "tone_encoded"],
        )
        for split in ("train", "valid", "test")
    }
    encoder.load_or_create(
        path=f"{hparams['output_folder']}/tone_encoder.txt",
        from_didatasets=[datasets["train"]],
        output_key="tone",
    )
    return datasets


if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    run_on_main(prepare_tones, [hparams["data_folder"], hparams["sizes"]])
    datasets = dataio_prepare(hparams)

    brain = ToneBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        epoch_counter=brain.hparams.epoch_counter,
        train_set=datasets["train"],
        valid_set=datasets["valid"],
        train_loader_kwargs=hparams["train_dataloader_opts"],
        valid_loader_kwargs=hparams["valid_dataloader_opts"],
    )
    brain.evaluate(
        datasets["test"],
        min_key="error",
        test_loader_kwargs=hparams["valid_dataloader_opts"],
    )
