"""Writes the port of a recipe that the guide describes.

``recipe`` finds the files and has each ported: ``python_file`` a script, ``yaml_file`` its
hyperparameters. ``equivalents`` is the table of what is replaced. Of a script ``uses`` reads
what it uses of SpeechBrain's, by LibCST, which the extra ``brain_lightning[port]`` installs;
``imports`` changes its imports, ``by_hand`` finds what a Trainer or a run option would do for
it, and ``instantiation`` whether the Brain is made in the way that this needs.
``local_modules`` has the modules beside the script, ``files`` makes diffs and writes.
"""
