"""What is recorded of a run: in loggers, as a picture, on the console.

``train_logger`` logs what a recipe reports to Lightning's loggers; ``log_versions`` finds the
log that a resumed run continues, with each epoch in it once; ``csv_rows`` does so for a
Trainer's CSVLogger. ``hyperparameters`` says which are logged; ``media`` logs sounds and
pictures. ``curve_plot`` is the callback that plots a training, ``curves`` the picture,
``rate_curve`` that of a search for a learning rate. ``objective`` prints the best value of one
number, for a search for hyperparameters; ``whole_file`` writes it and pictures. ``console``
shows this package's messages where nobody has configured logging.
"""
