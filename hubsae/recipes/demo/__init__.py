"""The demo: every part of hubsae meets once, offline, on a tiny model, in minutes on two cores."""
