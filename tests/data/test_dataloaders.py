"""DataLoaders that a Brain creates."""

from __future__ import annotations

import pytest
from torch.utils.data.datapipes.iter import IterableWrapper

from brain_lightning.data.dataloaders import make_dataloader


@pytest.mark.filterwarnings("ignore")  # a warning of torch about its own data pipes
def test_shuffling_is_switched_off_in_a_stream_that_shuffles_itself() -> None:
    stream = IterableWrapper(range(8)).shuffle()
    batches = make_dataloader(stream, shuffle=False, batch_size=None)
    assert list(batches) == list(range(8))
