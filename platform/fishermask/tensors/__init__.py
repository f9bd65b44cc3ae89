"""Tensors in, tensors out: models, training, Fisher information, the greedy objective. No files, no Ray."""
