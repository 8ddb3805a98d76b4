"""BrainCallback: Trainer and Brain reconciled, refused, restored.

When what happens, in the order of ``fit`` and of ``evaluate``:

=======================  =====================  ===============================================
Hook of the Brain        Event of the Run       Hook of Lightning
=======================  =====================  ===============================================
                         Run.begin              BrainCallback.setup
on_fit_start                                    BrainModule.configure_optimizers
on_stage_start(TRAIN)    run.train.start        BrainCallback.on_train_epoch_start
fit_batch                run.train.fit          BrainModule.training_step, optimizer_step
on_stage_end(TRAIN)      run.train.end          BrainModule.on_train_batch_end, of the last
                                                batch; without one
                                                BrainCallback.on_train_epoch_end
on_stage_start(VALID)    run.valid.start        BrainModule.on_validation_model_eval
evaluate_batch(VALID)    run.valid.evaluate     BrainModule.validation_step
on_stage_end(VALID)      run.valid.end          BrainModule.on_validation_epoch_end
                         Run.end_epoch          BrainCallback.on_train_epoch_end
on_evaluate_start        run.test.recover_best  BrainModule.on_test_model_eval
on_stage_start(TEST)     run.test.start         BrainModule.on_test_model_eval
evaluate_batch(TEST)     run.test.evaluate      BrainModule.test_step
on_stage_end(TEST)       run.test.end           BrainModule.on_test_epoch_end
                         Run.close              BrainCallback.teardown, on_exception
=======================  =====================  ===============================================
"""
