"""Models, their training, and the metrics of their predictions."""
