"""The mathematics: functions from tensors to tensors.

Gradients of single samples, the Fisher diagonal and masks, Fisher embeddings, the greedy objective, distances, and the
preprocessing of images. Nothing here reads files or configuration, trains a model, or knows Ray.
"""
