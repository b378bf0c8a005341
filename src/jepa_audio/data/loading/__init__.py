"""From a corpus to batches: crops, their order, loaders and worker processes."""
