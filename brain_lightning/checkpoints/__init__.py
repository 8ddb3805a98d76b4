"""SpeechBrain's ``CKPT+`` directories, written atomically: complete or absent.

``checkpointer`` saves and recovers the objects in ``recoverables``. ``async_save`` copies
states to the host and writes them in the background. ``shared_recovery`` lets all ranks
recover the same checkpoint. ``hooks`` finds the functions that save and load an object.
``state_files``, ``meta_file`` and ``epoch_files`` read and write the files of states, of the
meta values and of epoch counters. ``atomic_directory`` publishes a directory in one step,
``integrity`` verifies it with checksums, and ``checkpoint`` lists, ranks and averages
checkpoints. ``content`` holds a checkpoint directory as one value.
"""
