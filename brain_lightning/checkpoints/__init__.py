"""SpeechBrain's ``CKPT+`` directories, which are there whole or not at all.

``checkpointer`` saves and recovers, for the objects in ``recoverables``; ``async_save`` copies
states to the host and saves in the background, and ``shared_recovery`` lets all processes
recover the same checkpoint. ``hooks`` finds how an object is saved, ``state_files`` and
``meta_file`` read and write its files, ``epoch_files`` those of epoch counters.
``atomic_directory`` publishes a directory in one step, ``integrity`` checks it, ``checkpoint``
ranks and averages those that are there.
"""
