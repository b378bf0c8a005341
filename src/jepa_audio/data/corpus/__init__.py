"""Corpora: find, index, describe, verify and pack audio files."""
