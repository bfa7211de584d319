"""What the grid search needs beyond the shared rooms: cells, spreading them, pairing them, saying what was found."""
