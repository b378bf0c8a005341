"""The report on runs and probes."""
