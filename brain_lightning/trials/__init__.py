"""What is tried before a long run and leaves nothing: learning rate, batch size, memory.

``trial`` fits and evaluates batches on a ``snapshot`` of everything that hangs on the Brain,
and ``isolation`` puts out of reach what the recipe saves and logs with. ``learning_rate`` and
``batch_size`` search, where ``finders`` has a callback of Lightning ask for it, and ``tune``
does so in place of a recipe's training. ``preflight`` tries the ``longest`` batches, by the
``lengths`` of examples, and says what ``memory`` each takes.
"""
