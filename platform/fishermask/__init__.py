"""Distributed batch active learning with Fisher information."""

__version__ = "0.1.0"
