"""Watch a run: losses, collapse, non-finite values, progress."""
