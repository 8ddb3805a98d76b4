"""Trials before a long run, without side effects: learning rate, batch size, memory.

``trial`` fits and evaluates batches on a ``snapshot`` of everything reachable from the Brain.
``object_state`` captures and restores single objects by type. ``isolation`` disables the
Checkpointers and train loggers of the recipe during a trial. ``learning_rate`` and
``batch_size`` run searches in a trial. ``finders`` starts a search for a Lightning callback,
and ``tune`` starts one in place of a recipe's training. ``preflight`` tries the ``longest``
batches, which it finds by the ``lengths`` of the examples, and reports the ``memory`` that
each batch uses.
"""
