"""Use of a pretrained encoder: load it and encode audio."""
