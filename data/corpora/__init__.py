"""Readers of corpora on disk or on the Hub, one module per kind."""
