"""One audio file: decoding and resampling."""
