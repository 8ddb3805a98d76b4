"""SpeechBrain's models whose methods a beam search calls in VALID."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.decoders.seq2seq import S2STransformerBeamSearcher
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.linear import Linear
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.parity.recipes import make
from tests.parity.sides import Record, Side

from .scenarios import GLOO

TOKENS, BOS, EOS = 12, 1, 2


def utterances() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, TOKENS, (8, 5), generator=generator)
    words[:, 0] = BOS
    return TensorDataset(torch.randn(8, 10, 8, generator=generator), words)


def recognizer(encoder: str, side: Side, record: Record) -> Any:
    """Attention's loss in TRAIN, a beam search in VALID, which calls ``decode``."""
    options = {"encoder_module": encoder, "causal": False, "conformer_activation": nn.SiLU}
    sizes = {"d_model": 16, "nhead": 2, "d_ffn": 24, "dropout": 0.1}
    modules = {
        "Transformer": TransformerASR(
            TOKENS, 8, num_encoder_layers=2, num_decoder_layers=1, kernel_size=3,
            normalize_before=True, **sizes, **options,
        ),
        "seq_lin": Linear(TOKENS, input_size=16),
    }  # fmt: skip
    searcher = S2STransformerBeamSearcher(
        [modules["Transformer"], modules["seq_lin"]], bos_index=BOS, eos_index=EOS,
        min_decode_ratio=0.0, max_decode_ratio=0.6, beam_size=3, using_eos_threshold=False,
    )  # fmt: skip

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        lengths = torch.linspace(1.0, 0.6, len(batch[0]))
        encoded, decoded = self.modules.Transformer(batch[0], batch[1], lengths)
        if stage != side.Stage.TRAIN:
            encoded = modules["Transformer"].encode(batch[0], lengths)
            record.results.append(searcher(encoded.detach(), lengths)[0])
        return self.modules.seq_lin(decoded).log_softmax(-1)

    def compute_objectives(self: Any, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
        words = batch[1][:, 1:].flatten()
        return nn.functional.nll_loss(predictions[:, :-1].flatten(0, 1), words)

    brain = make(
        side, record, modules, run_opts=GLOO,
        compute_forward=compute_forward, compute_objectives=compute_objectives,
    )  # fmt: skip
    brain.fit(
        range(2), utterances(), utterances(),
        train_loader_kwargs={"batch_size": 2}, valid_loader_kwargs={"batch_size": 4},
    )  # fmt: skip
    return brain


def transformer(side: Side, record: Record) -> Any:
    return recognizer("transformer", side, record)


def conformer(side: Side, record: Record) -> Any:
    return recognizer("conformer", side, record)


# Small as they are, they are gathered one by one.
BLOCKS = {
    "transformer": ["TransformerEncoderLayer", "TransformerDecoderLayer"],
    "conformer": ["ConformerEncoderLayer", "TransformerDecoderLayer"],
}
SEARCHES = [transformer, conformer]
