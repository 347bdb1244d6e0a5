"""Readers: what a corpus on disk or on the Hub says it holds, one module per kind."""
