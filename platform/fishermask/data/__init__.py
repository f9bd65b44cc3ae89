"""Data sets: decoded once per machine into a store that all processes map, with ids that lead back to the source."""
