"""A briefly trained thin ResNet-18, and images of CIFAR-10, or random images if the data is not available."""

import torch

from fishermask.config import DataConfig
from fishermask.data.dataset import load_dataset
from fishermask.learning import models
from fishermask.tensors.images import Statistics, normalize

CIFAR = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def trained(parquet, count, epochs=3):
    """Return the network in eval mode and ``count`` uint8 images; ``parquet`` is the folder of CIFAR-10, or None."""
    torch.manual_seed(0)
    model = models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0)
    if parquet:
        config = DataConfig(name="parquet", train=f"{parquet}/train*.parquet", test=f"{parquet}/test*.parquet")
        train = load_dataset(config).train
        images, labels = train.images[:count], torch.as_tensor(train.labels[:count])
    else:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,))
    inputs = normalize(images, CIFAR)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for batch, label in zip(inputs.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), label).backward()
            optimizer.step()
    return model.eval(), images
