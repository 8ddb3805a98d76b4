"""What makes a run that was killed resume bit for bit.

``run_state`` is the recoverable that is saved with every checkpoint; what it saves, by names
that are part of the file format, is in ``saved_state``, and follows from ``run_progress``:
in which phase the run is, and its numbers. That puts together ``position`` (the batch to
resume at, in loaders of loaders), ``data_position`` (in one loader), ``sampler_states``,
``worker_states`` (of DataLoader workers), ``random_state``, ``epoch_statistics`` (what hooks
accumulate on the Brain), ``before_batch`` (what a batch changes, to undo a part of one) and
``process_state`` (what each process has of its own). ``plain_values`` copies what can be saved
without pickling code.
"""
