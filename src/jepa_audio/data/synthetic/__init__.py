"""A labelled corpus of synthesised notes in the folder layout of NSynth."""
