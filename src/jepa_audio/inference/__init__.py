"""Use of a pretrained encoder."""
