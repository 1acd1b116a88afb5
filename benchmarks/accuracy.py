"""``python -m benchmarks.accuracy``: float32 error against float64 as the inputs' mean moves away from zero.

The largest error of the normalised output and of the input's gradient, each relative to the largest entry.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.functional import batch_norm

SHAPE = (16, 32, 28, 28)
RATIOS = (0, 10, 1e3, 1e4, 1e6)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def exact(x: Tensor, dy: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Batch norm and its input gradient in float64, from the formulas."""
    x, dy = x.double(), dy.double()
    dims = (0, 2, 3)
    centered = x - x.mean(dims, keepdim=True)
    rstd = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = centered * rstd
    return y, rstd * (dy - dy.mean(dims, keepdim=True) - y * (dy * y).mean(dims, keepdim=True))


def errors(function, ratio: float, memory_format: torch.memory_format) -> tuple[float, float]:
    """Of output and input gradient, for inputs of this mean / std."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=generator) + ratio).contiguous(memory_format=memory_format)
    dy = torch.randn(SHAPE, generator=generator).contiguous(memory_format=memory_format)
    leaf = x.clone().requires_grad_()
    y = function(leaf, None, None, training=True)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return tuple(
        ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip((y, dx), exact(x, dy), strict=True)
    )


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0]).parse_args()
    print("| mean / std | " + " | ".join(f"torch, {n} | fastnorm, {n}" for n in LAYOUTS) + " |")
    print("|---" * (1 + 2 * len(LAYOUTS)) + "|")
    for ratio in RATIOS:
        cells = []
        for memory_format in LAYOUTS.values():
            for function in (F.batch_norm, batch_norm):
                cells.append(" / ".join(f"{e:.0e}" for e in errors(function, ratio, memory_format)))
        print(f"| {ratio:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
