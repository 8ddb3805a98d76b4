"""Settings that say how the modules of a Brain are sharded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from brain_lightning.errors import UnsupportedError

# Value of ``blocks`` that selects large layers automatically.
AUTO = "auto"


@dataclass(frozen=True)
class Sharding:
    """Settings of ``FSDP2Strategy``, which describes them in detail.

    Attributes:
        blocks: Names of classes whose instances are gathered one by one, or ``"auto"``.
        methods: Names of methods that use weights, in addition to ``methods.METHODS``.
        gather_to_evaluate: Whether all weights are gathered in VALID and TEST.
        cpu_offload: Whether shards are stored in CPU memory between their uses.
        replicate: Number of copies of the model.
        sharded_checkpoints: Whether each rank saves its own shards.

    Raises:
        UnsupportedError: A value is invalid.
    """

    blocks: Collection[str] | str = AUTO
    methods: Collection[str] = ()
    gather_to_evaluate: bool = True
    cpu_offload: bool = False
    replicate: int = 1
    sharded_checkpoints: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str) and self.blocks != AUTO:
            raise UnsupportedError(
                f"FSDP2Strategy(blocks={self.blocks!r}) is not valid. Use 'auto', a list of "
                f"class names such as [{self.blocks!r}], or [] for no blocks."
            )
        if isinstance(self.methods, str):
            raise UnsupportedError(
                f"FSDP2Strategy(methods={self.methods!r}) is not valid. Use a list: "
                f"[{self.methods!r}]."
            )
        if type(self.replicate) is not int or self.replicate < 1:
            raise UnsupportedError(
                f"FSDP2Strategy(replicate={self.replicate!r}) is not valid. Set it to the "
                "number of copies of the model: an integer of 1 or more that divides the "
                "number of ranks."
            )
