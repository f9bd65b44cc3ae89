"""Sweeps: read a YAML file, execute its runs on Ray Tune or in this process, and write each round when it finishes."""
