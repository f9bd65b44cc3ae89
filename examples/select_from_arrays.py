"""Label your own pool in rounds, with your own model, arrays and training loop."""

import numpy as np
import torch

import fishermask

rng = np.random.default_rng(0)
centers = 3 * rng.normal(size=(4, 16))  # four classes of samples with 16 features
classes = rng.integers(4, size=3000)
pool = (centers[classes] + 3 * rng.normal(size=(3000, 16))).astype(np.float32)


def train(labeled: list[int]) -> torch.nn.Module:
    """Return a classifier trained on the labeled samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.from_numpy(pool[labeled]), torch.from_numpy(classes[labeled])
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


labeled = list(range(8))
for round_index in range(4):
    model = train(labeled)
    with torch.no_grad():
        accuracy = (model(torch.from_numpy(pool)).argmax(1).numpy() == classes).mean()
    print(f"{len(labeled)} labels: accuracy {accuracy:.3f}")
    selection = fishermask.select(model, pool, labeled, budget=16, seed=round_index)
    labeled += selection.positions.tolist()  # in practice, annotators label these samples now
print(selection)
