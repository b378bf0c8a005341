"""Probes of frozen encoders, compared with random-init baselines and log-mel statistics."""
