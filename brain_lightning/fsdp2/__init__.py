"""FSDP2: shards each entry of a Brain's modules over the ranks.

``strategy`` holds the strategy for a Trainer, and ``sharding`` its settings. ``shard`` shards
the entries. ``blocks`` selects the parts of an entry that are gathered one by one.
``methods`` gathers the weights for methods other than ``forward``. ``hooks`` makes a sharded
module behave like one in DDP. ``unsupported`` raises errors for modules that cannot be
sharded. ``evaluate`` gathers the weights for VALID and TEST. ``meta`` initializes modules that
were built on the meta device. ``state_dict`` makes sharded modules and their optimizers save
and load full tensors, and ``tensors`` converts between shards and full tensors.
``sharded_files`` lets each rank save its own shards instead.
"""
