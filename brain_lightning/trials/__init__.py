"""What is tried before a long run, and leaves nothing behind: learning rate, batch size, memory.

``trial`` fits and evaluates batches on a ``snapshot`` of the whole run.
"""
