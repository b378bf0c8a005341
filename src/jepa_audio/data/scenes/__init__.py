"""Clips placed in rooms with noise."""
