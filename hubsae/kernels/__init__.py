"""Encode, select and decode on plain tensors: the arithmetic that everything else stands on."""
