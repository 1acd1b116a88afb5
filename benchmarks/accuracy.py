"""``python -m benchmarks.accuracy``: float32 error against float64 as the inputs' mean moves away from zero.

The largest error of the normalised output and of the input's gradient, each relative to the largest entry.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from fastnorm.functional import batch_norm, group_norm, instance_norm

SHAPE = (16, 32, 28, 28)
RATIOS = (0, 10, 1e3, 1e4, 1e6)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = 8


def _torch_layer_norm2d(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (SHAPE[1],)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Norm:
    """torch's function, fastnorm's, and how the input is seen so that `dims` are what is normalised over."""

    torchs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dims: tuple[int, ...]


NORMS = {
    "batch norm": Norm(
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: batch_norm(x, None, None, training=True),
        SHAPE,
        (0, 2, 3),
    ),
    "instance norm": Norm(F.instance_norm, instance_norm, SHAPE, (2, 3)),
    "group norm": Norm(
        partial(F.group_norm, num_groups=GROUPS),
        partial(group_norm, num_groups=GROUPS),
        (SHAPE[0], GROUPS, -1),
        (2,),
    ),
    "layer norm of channels": Norm(
        _torch_layer_norm2d, fastnorm.LayerNorm2d(SHAPE[1], elementwise_affine=False), SHAPE, (1,)
    ),
}


def exact(norm: Norm, x: Tensor, dy: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The norm and its input gradient in float64, from the formulas."""
    x, dy = (t.double().reshape(norm.shape) for t in (x, dy))
    mean = partial(torch.mean, dim=norm.dims, keepdim=True)
    centered = x - mean(x)
    rstd = (mean(centered.square()) + eps).rsqrt()
    y = centered * rstd
    dx = rstd * (dy - mean(dy) - y * mean(dy * y))
    return y.reshape(SHAPE), dx.reshape(SHAPE)


def errors(norm: Norm, function: Callable, ratio: float, memory_format: torch.memory_format) -> tuple[float, ...]:
    """Of output and input gradient, for inputs of this mean / std."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=generator) + ratio).contiguous(memory_format=memory_format)
    dy = torch.randn(SHAPE, generator=generator).contiguous(memory_format=memory_format)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    truth = exact(norm, x, dy)
    return tuple(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip((y, dx), truth, strict=True))


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0]).parse_args()
    print("| norm | mean / std | " + " | ".join(f"torch, {n} | fastnorm, {n}" for n in LAYOUTS) + " |")
    print("|---" * (2 + 2 * len(LAYOUTS)) + "|")
    for name, norm in NORMS.items():
        for ratio in RATIOS:
            cells = [
                " / ".join(f"{e:.0e}" for e in errors(norm, function, ratio, memory_format))
                for memory_format in LAYOUTS.values()
                for function in (norm.torchs, norm.ours)
            ]
            print(f"| {name} | {ratio:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
