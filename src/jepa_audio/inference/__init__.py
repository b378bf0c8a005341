"""Load a pretrained encoder and encode audio."""
