"""Sweeps: a YAML file becomes runs, Ray Tune runs them, their results are written as they come."""
