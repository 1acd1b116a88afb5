"""``python -m benchmarks.memory``: what a training step keeps for its backward pass, its peak, and its time.

torch.nn's networks as they are, then fused, then fused under save_memory; bytes, peak and time as shares of the first.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from fastnorm import saved_bytes

from .common import peak_bytes
from .twins import twin

Build = Callable[[], nn.Module]


def conv_stack(depth: int = 6, channels: int = 32) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class UNet(nn.Module):
    """GroupNorm and SiLU, two levels, skip connections concatenated."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(),
            )  # fmt: skip

        c = channels
        self.down1, self.down2, self.bottom = double(3, c), double(c, 2 * c), double(2 * c, 4 * c)
        self.lift2, self.lift1 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.up2, self.up1, self.head = double(4 * c, 2 * c), double(2 * c, c), nn.Conv2d(c, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.bottom(F.max_pool2d(b, 2))
        y = self.up2(torch.cat([self.lift2(y), b], 1))
        y = self.up1(torch.cat([self.lift1(y), a], 1))
        return self.head(y).mean((2, 3))


NETWORKS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "conv-BN-ReLU x 6": (conv_stack, (16, 3, 32, 32)),
    "U-Net, GN + SiLU": (UNet, (8, 3, 32, 32)),
    "vgg16_bn": (lambda: twin("vgg16_bn", 10, small=True), (16, 3, 32, 32)),
    "resnet18": (lambda: twin("resnet18", 10, small=True), (16, 3, 32, 32)),
    "resnet50": (lambda: twin("resnet50", 10, small=True), (16, 3, 32, 32)),
    "densenet121": (lambda: twin("densenet121", 10, small=True), (16, 3, 32, 32)),
    "googlenet": (lambda: twin("googlenet", 10, small=True), (16, 3, 32, 32)),
}


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().mean().backward()


def step_peak(model: nn.Module, x: Tensor) -> int:
    step(model, x)
    model.zero_grad()
    return peak_bytes(lambda: step(model, x))


def measure(build: Build, shape: tuple[int, ...], pairs: int) -> dict[str, list[float]]:
    """Shares of torch.nn's bytes, peak and time for: fused, save_memory, save_memory without concatenations."""
    torch.manual_seed(0)
    plain, x = build(), torch.randn(shape)
    fused, saving = copy.deepcopy(plain), copy.deepcopy(plain)
    fastnorm.fuse(fused)
    fastnorm.fuse(saving, save_memory=True)
    models = {"torch.nn": plain, "fused": fused, "save_memory": saving}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for i in range(pairs + 1):
        for name in list(models)[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            step(models[name], x)
            if i:
                taken[name].append(time.perf_counter() - begin)
    bytes_ = {name: saved_bytes(m, x) for name, m in models.items()}
    peaks = {name: step_peak(m, x) for name, m in models.items()}
    result = {
        "torch.nn": [bytes_["torch.nn"] / 1e6, peaks["torch.nn"] / 1e6, statistics.median(taken["torch.nn"]) * 1e3]
    }
    for name in ("fused", "save_memory"):
        ratios = [a / b for a, b in zip(taken[name], taken["torch.nn"], strict=True)]
        result[name] = [
            bytes_[name] / bytes_["torch.nn"], peaks[name] / peaks["torch.nn"], statistics.median(ratios),
        ]  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="network", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--pairs", type=int, default=5, help="steps that are timed of each")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := set(args.networks) - set(NETWORKS):
        parser.error(f"unknown network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    print(
        "network           torch.nn: saved MB, peak MB, ms   fused: saved, peak, time   save_memory: saved, peak, time"
    )
    for name in tqdm(args.networks or NETWORKS, unit="network", dynamic_ncols=True):
        rows = measure(*NETWORKS[name], args.pairs)
        plain, fused, saving = rows["torch.nn"], rows["fused"], rows["save_memory"]
        tqdm.write(
            f"{name:18}{plain[0]:18.1f} {plain[1]:8.1f} {plain[2]:7.1f}"
            + "".join(f"{'':9}{r[0]:5.2f} {r[1]:5.2f} {r[2]:5.2f}" for r in (fused, saving))
        )


if __name__ == "__main__":
    main()
