"""Step 3: the transformer and its positions."""
