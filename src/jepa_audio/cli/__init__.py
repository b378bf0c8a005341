"""The command `jepa-audio`."""
