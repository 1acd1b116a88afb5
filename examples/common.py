"""What the examples share: their arguments, scikit-learn's digits, training with a progress bar, plots."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm


def arguments(about: str, **defaults: int) -> argparse.Namespace:
    """--quick, --plot FILE, and a number for each default, as (usual, quick)."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short run that still shows the finding")
    parser.add_argument("--plot", default=None, metavar="FILE", help="the picture; default: NAME.png")
    for name, (usual, _) in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default {usual}")
    args = parser.parse_args()
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.quick])
    torch.manual_seed(0)
    return args


def digits(size: int = 28) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 images of handwritten digits and their labels; every fifth is kept for testing."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def train_epoch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, order: Tensor, bar: tqdm
) -> float:  # fmt: skip
    """The mean loss over one pass in the given order."""
    model.train()
    total = 0.0
    for batch in order.split(64):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
        bar.update()
    return total / len(order)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, ...], epochs: int, about: str
) -> tuple[list[float], list[float]]:
    """Losses and test accuracies of every epoch."""
    images, labels, test_images, test_labels = data
    losses, accuracies = [], []
    with tqdm(total=epochs * -(-len(labels) // 64), unit="batch", desc=about) as bar:
        for _ in range(epochs):
            losses.append(train_epoch(model, optimizer, images, labels, torch.randperm(len(labels)), bar))
            accuracies.append(accuracy(model, test_images, test_labels))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.1%}")
    return losses, accuracies


def axes(count: int, title: str) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, places = plt.subplots(1, count, figsize=(5 * count, 4), layout="constrained", squeeze=False)
    figure.suptitle(title)
    return figure, list(places[0])


def save(figure: plt.Figure, args: argparse.Namespace, script: str) -> None:
    path = args.plot or f"{Path(script).stem}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot: {path}")


def finding(what: str, holds: bool) -> None:
    """Prints it, and raises AssertionError where it does not hold."""
    print(f"{'found' if holds else 'NOT found'}: {what}")
    assert holds, what


def each(items: Iterable, about: str) -> tqdm:
    return tqdm(items, desc=about, dynamic_ncols=True)
