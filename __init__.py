"""SEAM: speech recognition with a frozen speech encoder, an alignment decoder and a frozen language model."""

__version__ = "0.1.0"
