"""DataLoaders as a Brain makes them."""

from __future__ import annotations

import pytest
from torch.utils.data.datapipes.iter import IterableWrapper

from brain_lightning.data.dataloaders import make_dataloader


@pytest.mark.filterwarnings("ignore")  # torch's, of its own data pipes
def test_a_stream_that_shuffles_itself_is_told_not_to() -> None:
    stream = IterableWrapper(range(8)).shuffle()
    batches = make_dataloader(stream, shuffle=False, batch_size=None)
    assert list(batches) == list(range(8))
