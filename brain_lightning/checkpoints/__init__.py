"""CKPT+ directories, which are whole or not there."""
