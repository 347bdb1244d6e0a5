"""Manifests, corpora, augmentation and batching."""
