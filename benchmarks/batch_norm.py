"""Batch norm's cases: shapes of real networks, fused and plain, forward and backward, training and evaluation."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import fastnorm
from fastnorm.functional import batch_norm

from .common import Case
from .norms import Bench, call_cases

SHAPES = {
    (64, 6, 28, 28): "LeNet, first block",
    (32, 64, 56, 56): "ResNet-50, first stage",
    (32, 256, 14, 14): "ResNet-50, third stage",
    (32, 512, 7, 7): "ResNet-50, last stage",
}
QUICK_SHAPES = ((64, 6, 28, 28), (32, 64, 56, 56))
FORWARD = (
    ("forward", "forward", None, False),
    ("forward + relu", "forward", "relu", False),
    ("forward + residual + relu", "forward", "relu", True),
)
EVALUATION = tuple((what.replace("forward", "eval"), *rest) for what, *rest in FORWARD)
BACKWARD = (
    ("backward", "backward", None, False),
    ("backward + residual + relu", "backward", "relu", True),
    ("both + relu", "both", "relu", False),
    ("both + residual + relu", "both", "relu", True),
)


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        c = shape[1]
        running = torch.zeros(c, device=device, dtype=getattr(torch, dtype))
        statistics = {True: (None, None), False: (running, running + 1)}

        def eager(x, weight, bias, activation, residual, *, training, statistics=statistics):
            y = F.batch_norm(x, *statistics[training], weight, bias, training)
            y = y if residual is None else y + residual
            return F.relu(y) if activation else y

        def ours(x, weight, bias, activation, residual, *, training, statistics=statistics):
            return batch_norm(
                x, *statistics[training], weight, bias, training, activation=activation, residual=residual
            )

        bench = Bench("batch_norm", shape, (c,), device, dtype, layout, against)
        for training, plan in ((True, FORWARD), (False, EVALUATION), (True, BACKWARD)):
            if plan is FORWARD or not quick:
                yield from bench.cases(partial(ours, training=training), partial(eager, training=training), plan)
    if layout == "nchw" and not quick:
        modules = fastnorm.BatchNorm1d(8), torch.nn.BatchNorm1d(8)
        yield from call_cases("batch_norm", (4, 8), *modules, device, dtype, against)
