"""Records of a run: metrics in loggers, plots, and messages on the console.

``train_logger`` sends the metrics of a recipe to Lightning's loggers. ``log_versions`` finds
the log that a resumed run continues, with one entry per epoch, and ``csv_rows`` does the same
for a Trainer's CSVLogger. ``hyperparameters`` selects the hyperparameters to log. ``media``
logs audio and figures. ``curve_plot`` is the callback that plots a training. ``curves`` draws
this plot, and ``rate_curve`` draws the plot of a learning rate search. ``objective`` prints
the best value of one metric for a hyperparameter search. ``atomic_file`` replaces files
atomically. ``console`` shows this package's log messages if logging is not configured.
"""
