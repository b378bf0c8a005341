"""Decode and resample one audio file."""
