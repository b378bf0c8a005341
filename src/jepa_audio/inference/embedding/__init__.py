"""Embed the files of a corpus: files → chunks → one table, on one or several devices."""
