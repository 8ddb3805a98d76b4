"""What is tried before a long run and leaves nothing: learning rate, batch size, memory.

``trial`` fits and evaluates batches on a ``snapshot`` of everything that hangs on the Brain,
of which ``kept`` knows what to keep of each kind of object; ``isolation`` puts out of reach
what the recipe saves and logs with. ``learning_rate`` and ``batch_size`` search in a trial:
``finders`` has them do so where a callback of Lightning asks for it, ``tune`` in place of a
recipe's training. ``preflight`` tries the ``longest`` batches, by the ``lengths`` of examples,
and says what ``memory`` each takes.
"""
