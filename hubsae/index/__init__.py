"""Index: what the features of an SAE fire on, and the pages that show it."""
