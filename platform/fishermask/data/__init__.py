"""Data sets: decoded once per machine into a store that all processes map; ids name the images in their source."""
