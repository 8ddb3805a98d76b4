"""How the modules of a Brain are sharded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from brain_lightning.errors import UnsupportedError

# Blocks of an entry that are large enough to be gathered one by one.
AUTO = "auto"


@dataclass(frozen=True)
class Sharding:
    """How the modules of a Brain are sharded; see ``FSDP2Strategy``.

    Attributes:
        blocks: Names of classes, or ``"auto"``.
        methods: Methods that use weights, in addition to ``methods.METHODS``.
        gather_to_evaluate: Whether weights are whole in VALID and TEST.
        cpu_offload: Whether shards are in memory of the CPU between their uses.
        replicate: How many copies there are of all shards together.
        sharded_checkpoints: Whether each process writes its own shards.

    Raises:
        UnsupportedError: A value makes no sense.
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
                f"FSDP2Strategy(blocks={self.blocks!r}): give 'auto', a list of names of "
                f"classes such as [{self.blocks!r}], or [] for none"
            )
        if isinstance(self.methods, str):
            raise UnsupportedError(
                f"FSDP2Strategy(methods={self.methods!r}): give a list, [{self.methods!r}]"
            )
        if type(self.replicate) is not int or self.replicate < 1:
            raise UnsupportedError(
                f"FSDP2Strategy(replicate={self.replicate!r}) must be the number of copies of "
                "the model, 1 or more, of which the number of processes is a multiple"
            )
