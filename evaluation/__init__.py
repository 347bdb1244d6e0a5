"""Decoding a corpus, scoring and reports."""
