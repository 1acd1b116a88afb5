"""Trains LeNet with batch norm on scikit-learn's digits twice from the same weights: torch.nn against fastnorm.nn.

Prints loss and accuracy of both side by side, seconds per epoch, how far the parameters are apart at the end, and a
short table of kernel speed-ups on this machine; draws the curves into demo.png.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import torch
from common import accuracy, digits, train_epoch
from tqdm import tqdm

import fastnorm

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES: dict[str, ModuleType] = {"torch.nn": torch.nn, "fastnorm.nn": fastnorm.nn}


def lenet(nn: ModuleType) -> torch.nn.Module:
    """LeNet-5 with batch norm after every layer but the last, for 1 x 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.BatchNorm1d(120), nn.ReLU(),
        nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def train(epochs: int) -> tuple[dict[str, dict[str, list[float]]], float]:
    """The curves of both libraries, and the largest difference of their parameters at the end."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    models = {name: lenet(nn) for name, nn in LIBRARIES.items()}
    models["fastnorm.nn"].load_state_dict(models["torch.nn"].state_dict())
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for n, m in models.items()}
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs) for o in optimizers.values()]
    curves = {name: {"loss": [], "accuracy": [], "seconds": []} for name in models}
    batches = -(-len(labels) // 64)
    for epoch in range(epochs):
        order = torch.randperm(len(labels))
        with tqdm(total=len(models) * batches, unit="batch", leave=False, desc=f"epoch {epoch + 1}/{epochs}") as bar:
            for name, model in models.items():
                begin = time.perf_counter()
                loss = train_epoch(model, optimizers[name], images, labels, order, bar)
                curves[name]["seconds"].append(time.perf_counter() - begin)
                curves[name]["loss"].append(loss)
                curves[name]["accuracy"].append(accuracy(model, test_images, test_labels))
        for scheduler in schedulers:
            scheduler.step()
        print(
            f"epoch {epoch + 1:2}  "
            + "   ".join(
                f"{n}: loss {c['loss'][-1]:.4f}, test accuracy {c['accuracy'][-1]:.2%}, {c['seconds'][-1]:.2f} s"
                for n, c in curves.items()
            ),
            flush=True,
        )
    theirs, ours = (dict(m.named_parameters()) for m in models.values())
    return curves, max((theirs[k] - ours[k]).abs().max().item() for k in theirs)


def draw(path: str, curves: dict[str, dict[str, list[float]]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (key, title) in zip(
        axes,
        {"loss": "training loss", "accuracy": "test accuracy", "seconds": "seconds per epoch"}.items(),
        strict=True,
    ):
        for name, style in zip(curves, ("--", "-"), strict=True):
            axis.plot(range(1, len(curves[name][key]) + 1), curves[name][key], style, marker=".", label=name)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.legend()
    axes[0].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    figure.suptitle("LeNet with batch norm on scikit-learn's digits, from the same weights")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--plot", default="demo.png")
    parser.add_argument("--no-benchmark", action="store_true", help="train only")
    args = parser.parse_args()
    print("LeNet with batch norm on scikit-learn's digits, torch.nn's layers and fastnorm's from the same weights\n")
    curves, difference = train(args.epochs)
    seconds = {name: sorted(c["seconds"])[len(c["seconds"]) // 2] for name, c in curves.items()}
    print("\nseconds per epoch (median): " + ", ".join(f"{n} {s:.2f}" for n, s in seconds.items()))
    print(f"largest difference between their parameters at the end: {difference:.1e}")
    draw(args.plot, curves)
    print(f"curves: {args.plot}")
    if args.no_benchmark:
        return
    print("\nkernels on this machine, one thread, against torch eager:", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks", "batch_norm", "--quick"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
