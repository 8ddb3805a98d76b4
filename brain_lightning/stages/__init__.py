"""The order of events in SpeechBrain's loops: runs, stages, metrics and progress bars.

``run`` is one ``fit`` or ``evaluate``. Its stages are in ``train`` and ``evaluation``, and
share ``base``. In the table, each row is one step of SpeechBrain's loops, in their order.
The last column names the hook in which the step runs: C is ``BrainCallback``, M is
``BrainModule``.

======================  ==========================  =======================================
SpeechBrain             this package                Lightning
======================  ==========================  =======================================
fit, evaluate           Run.begin                   C.setup
on_fit_start            (the module calls it)       M.configure_optimizers
on_stage_start(TRAIN)   run.train.start             C.on_train_epoch_start
fit_batch               run.train.fit               M.optimizer_step if Lightning steps,
                                                    M.training_step if the Brain steps,
                                                    M.fit_batch in the lean loop
(save? SIGTERM?)        run.train.end_batch         M.on_train_batch_end
next(train_set)         run.train.fetch             M.on_train_batch_end
on_stage_end(TRAIN)     run.train.end               M.on_train_batch_end of the last batch,
                                                    C.on_train_epoch_end if there was no batch
on_stage_start(VALID)   run.valid.start             M.on_validation_model_eval
evaluate_batch(VALID)   run.valid.evaluate          M.validation_step
on_stage_end(VALID)     run.valid.end               M.on_validation_epoch_end
(another epoch?)        Run.end_epoch               C.on_train_epoch_end
next(epoch_counter)     Epochs.more                 before C.on_train_epoch_start
(for epoch in …)        Run.start_epoch             before C.on_train_epoch_start
                        Run.finish_epoch            after C.on_train_epoch_end
on_evaluate_start       run.test.recover_best       M.on_test_model_eval
on_stage_start(TEST)    run.test.start              M.on_test_model_eval
evaluate_batch(TEST)    run.test.evaluate           M.test_step
on_stage_end(TEST)      run.test.end                M.on_test_epoch_end
(the end, or an error)  Run.close                   C.teardown, C.on_exception
======================  ==========================  =======================================

A recipe that calls ``_fit_train`` and ``_fit_valid`` itself runs the same stages one by one,
through ``Run.parts``.

``epochs`` has the epoch counters and ``loader`` the loaders that Lightning iterates.
``progress`` has the progress bar, ``metrics`` the numbers that stages report, and
``running_average`` the average loss of an evaluation. ``interval_checkpoints`` saves within
an epoch, ``sharded_evaluation`` divides a validation among ranks, and ``error_context`` adds
the stage, epoch, step and batch to an error.
"""
