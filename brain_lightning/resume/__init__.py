"""What makes a run that was killed resume bit for bit.

``run_state`` is the recoverable that is saved with every checkpoint. It puts together
``data_position`` (the batch to resume at, in any loader), ``examples`` (the same where
batches have another size by now), ``sampler_states``, ``worker_states`` (of DataLoader
workers), ``random_state`` and ``epoch_statistics`` (what hooks accumulate on the Brain).
``plain_values`` copies what can be saved without pickling code.
"""
