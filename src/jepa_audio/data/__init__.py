"""Audio files → batches: read one file, index a corpus, order it, crop it, batch it."""
