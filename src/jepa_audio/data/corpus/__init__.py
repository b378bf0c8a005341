"""Find, index, describe, verify and pack the audio files of a corpus."""
