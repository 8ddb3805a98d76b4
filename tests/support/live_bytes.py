"""How much memory tensors hold, counted exactly: no allocator, no garbage of others."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brain_lightning.compat.versions import DTensor


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made within it and are still there.

    Args:
        before: Tensors from before, which count as well.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live: dict[int, weakref.ref[UntypedStorage]] = {}
        self.peak = 0
        self._add(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            # What it does with its shards comes here next.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self._add(tree_leaves(result))
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes at the moment; FSDP2 empties storages without giving them up."""
        found = [storage() for storage in self._live.values()]
        return sum(storage.nbytes() for storage in found if storage is not None)

    def _add(self, found: Iterable[Any]) -> None:
        for tensor in found:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(local, Tensor) and not local.is_meta:
                storage = local.untyped_storage()
                key = storage._cdata
                if key not in self._live or self._live[key]() is None:
                    self._live[key] = weakref.ref(storage)
