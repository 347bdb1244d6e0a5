"""The three stages, one module each, and the tiny foundations of the demo."""
