"""The public functions. ``fishermask/__init__.py`` exports them; nothing else in the package is public."""
