"""Corpora → batches: find the audio, index it once, order it, crop it, batch it."""
