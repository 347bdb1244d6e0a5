"""Folders that others can load: export, push, and a check of both."""
