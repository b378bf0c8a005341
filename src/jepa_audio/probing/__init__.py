"""Probing: what heads read off a frozen encoder, beside its random-init twin and log-mel statistics."""
