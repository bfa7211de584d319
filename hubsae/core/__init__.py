"""The canonical SAE and what travels with it: config, codes, normaliser, metadata, hooks."""
