"""Maskers: grid → context tokens and target groups."""
