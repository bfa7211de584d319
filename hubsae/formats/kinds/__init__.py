"""One file per on-disk format of other tools; each holds `Format` objects, and a new file here is a new format."""
