"""Saves and restores the state of a run, so that it resumes with bitwise identical results.

``run_state`` is the recoverable that is saved with every checkpoint. ``saved_state`` defines
its content; the names in it are part of the file format. ``run_progress`` has the phase and
the counts of the run, from which the saved state follows.

The parts of the state are in ``position`` (batch to resume at, in combined loaders),
``data_position`` (in one loader), ``sampler_states``, ``worker_states`` (of DataLoader
workers), ``random_state``, ``epoch_statistics`` (values that hooks accumulate on the Brain),
``before_batch`` (copies to undo an incomplete batch) and ``process_state`` (values that differ
between ranks). ``plain_values`` copies values that can be saved without pickling code.
"""
