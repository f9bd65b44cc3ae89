"""The public functions, which ``fishermask`` offers by name; nothing else in the package is public."""
