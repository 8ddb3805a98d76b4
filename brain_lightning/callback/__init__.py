"""BrainCallback: Trainer and Brain reconciled, refused, restored.

When what happens, in the order of ``fit`` and of ``evaluate``:

==============================  ==================  ==========================================
Hook of the Brain               Event of the Run    Hook of Lightning
==============================  ==================  ==========================================
                                begin               BrainCallback.setup
on_fit_start                                        BrainModule.configure_optimizers
on_stage_start(TRAIN)           start_train         BrainCallback.on_train_epoch_start
fit_batch                       fit                 BrainModule.training_step, optimizer_step
on_stage_end(TRAIN)             end_train           BrainModule.on_train_batch_end, of the last
                                                    batch; without one
                                                    BrainCallback.on_train_epoch_end
on_stage_start(VALID)           start_valid         BrainModule.on_validation_model_eval
evaluate_batch(VALID)           evaluate            BrainModule.validation_step
on_stage_end(VALID)             end_valid           BrainModule.on_validation_epoch_end
                                end_epoch           BrainCallback.on_train_epoch_end
on_evaluate_start               recover_best        BrainModule.on_test_model_eval
on_stage_start(TEST)            start_test          BrainModule.on_test_model_eval
evaluate_batch(TEST)            evaluate            BrainModule.test_step
on_stage_end(TEST)              end_test            BrainModule.on_test_epoch_end
                                close               BrainCallback.teardown, on_exception
==============================  ==================  ==========================================
"""
