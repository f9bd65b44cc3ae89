"""Data sets: uint8 images in memory, labels, and ids that lead back to the source."""
