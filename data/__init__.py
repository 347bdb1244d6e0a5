"""Read corpora and manifests, and turn utterances into batches."""
