"""The files of a run: its folder, checkpoints, weights, and how they are read again."""
