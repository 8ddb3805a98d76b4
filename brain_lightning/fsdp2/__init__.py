"""FSDP2: each entry of a Brain's modules in shards, of which each process holds one.

``strategy`` is what a Trainer is given, and ``sharding`` what it says. ``shard`` puts an
entry in shards; ``blocks`` chooses the parts of it that are gathered one by one, ``methods``
has them gathered for more than ``forward``, ``hooks`` mends what a sharded module would do
differently from one in DDP, and ``unsupported`` refuses what cannot be sharded. ``evaluate``
gathers the weights for VALID and TEST, and ``meta`` initializes what has no memory yet.
``state_dict`` makes a sharded module, or an optimizer of one, save and load whole tensors, and
``tensors`` translates these; ``sharded_files`` lets each process save its own shards instead.
"""
