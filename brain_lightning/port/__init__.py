"""Ports a recipe to brain_lightning, as the guide describes.

``recipe`` finds the files of a recipe. ``python_file`` ports a script, and ``yaml_file`` ports
a hyperparameters file. ``equivalents`` is the table of replacements. ``uses`` finds the uses
of SpeechBrain in a script with LibCST, which the extra ``brain_lightning[port]`` installs.
``imports`` changes the imports. ``by_hand`` finds code that a Trainer or a run option
replaces, and ``instantiation`` checks that the Brain is created in a way that allows it.
``local_modules`` finds the modules in the script's folder. ``files`` writes diffs and files.
"""
