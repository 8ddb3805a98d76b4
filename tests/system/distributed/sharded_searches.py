"""SpeechBrain's models whose methods a search calls in VALID."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.decoders.seq2seq import (
    S2SRNNBeamSearcher,
    S2SRNNGreedySearcher,
    S2STransformerBeamSearcher,
)
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.RNN import GRU, LSTM, AttentionalRNNDecoder
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

    return fitted(side, record, modules, compute_forward)


def fitted(side: Side, record: Record, modules: Any, compute_forward: Any) -> Any:
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


def recurrent(side: Side, record: Record) -> Any:
    """Of torch's recurrent layers, which keep a list of their weights by themselves."""
    decoder = {
        "hidden_size": 8, "attn_dim": 8, "num_layers": 2, "enc_dim": 16, "input_size": 6,
        "kernel_size": 3, "channels": 2, "dropout": 0.1,
    }  # fmt: skip
    modules = {
        "lstm": LSTM(8, input_size=8, num_layers=2, bidirectional=True, dropout=0.1),
        "gru": GRU(8, input_size=16, bidirectional=True),
        "emb": Embedding(TOKENS, embedding_dim=6),
        "dec": AttentionalRNNDecoder("lstm", "location", **decoder),
        "lin": Linear(TOKENS, input_size=8),
    }
    parts = {"embedding": modules["emb"], "decoder": modules["dec"], "linear": modules["lin"]}
    ends = {
        "bos_index": BOS,
        "eos_index": EOS,
        "min_decode_ratio": 0.0,
        "max_decode_ratio": 0.6,
    }
    beam = S2SRNNBeamSearcher(**parts, **ends, beam_size=3, using_eos_threshold=False)
    searchers = (S2SRNNGreedySearcher(**parts, **ends), beam)

    def compute_forward(self: Any, batch: Any, stage: Any) -> Tensor:
        lengths = torch.linspace(1.0, 0.6, len(batch[0]))
        encoded, _ = self.modules.gru(self.modules.lstm(batch[0])[0])
        decoded, _ = self.modules.dec(self.modules.emb(batch[1]), encoded, lengths)
        if stage != side.Stage.TRAIN:
            record.results += [search(encoded.detach(), lengths)[0] for search in searchers]
        return self.modules.lin(decoded).log_softmax(-1)

    return fitted(side, record, modules, compute_forward)


# Small as they are, they are gathered one by one.
BLOCKS = {
    "transformer": ["TransformerEncoderLayer", "TransformerDecoderLayer"],
    "conformer": ["ConformerEncoderLayer", "TransformerDecoderLayer"],
}
SEARCHES = [transformer, conformer, recurrent]
