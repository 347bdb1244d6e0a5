"""Manifests, synthetic speech, augmentation and batching."""
