"""Group norm's and instance norm's cases: shapes of real networks, fused and plain, forward and backward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastnorm
from fastnorm.functional import group_norm, instance_norm

from .common import Case
from .norms import Bench, call_cases

# (op, shape, groups); instance norm's groups are its channels.
SHAPES = {
    ("group_norm", (32, 64, 56, 56), 32): "ResNet-50 with group norm, first stage",
    ("group_norm", (32, 256, 14, 14), 32): "the same, third stage",
    ("group_norm", (16, 320, 32, 32), 32): "Stable Diffusion's U-Net",
    ("group_norm", (8, 128, 64, 64), 32): "its autoencoder",
    ("instance_norm", (16, 64, 64, 64), 64): "style transfer, inner layers",
    ("instance_norm", (8, 32, 128, 128), 32): "U-Net, first stage",
}
QUICK = (("group_norm", (32, 64, 56, 56), 32), ("instance_norm", (16, 64, 64, 64), 64))
FORWARD = (
    ("forward", "forward", None, False),
    ("forward + silu", "forward", "silu", False),
    ("forward + residual + relu", "forward", "relu", True),
)
BACKWARD = (
    ("backward", "backward", None, False),
    ("backward + silu", "backward", "silu", False),
    ("backward + residual + relu", "backward", "relu", True),
    ("both + silu", "both", "silu", False),
)


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for op, shape, groups in QUICK if quick else SHAPES:

        def eager(x, weight, bias, activation, residual, op=op, groups=groups):
            if op == "group_norm":
                y = F.group_norm(x, groups, weight, bias)
            else:
                y = F.instance_norm(x, None, None, weight, bias)
            y = y if residual is None else y + residual
            return getattr(F, activation)(y) if activation else y

        def ours(x, weight, bias, activation, residual, op=op, groups=groups):
            if op == "group_norm":
                return group_norm(x, groups, weight, bias, activation=activation, residual=residual)
            return instance_norm(x, None, None, weight, bias, activation=activation, residual=residual)

        bench = Bench(op, shape, shape[1:2], device, dtype, layout, against)
        yield from bench.cases(ours, eager, FORWARD if quick else FORWARD + BACKWARD)
    if layout == "nchw" and not quick:
        modules = fastnorm.GroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
        yield from call_cases("group_norm", (4, 8, 16), *modules, device, dtype, against)
        modules = fastnorm.InstanceNorm1d(8), torch.nn.InstanceNorm1d(8)
        yield from call_cases("instance_norm", (4, 8, 16), *modules, device, dtype, against)
