"""The activations that a norm can end with, in torch's own functions: what the fused kernels are held to."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
}

# Those whose derivative takes two values: one bit per element is all that backward needs of z.
TWO_SLOPES = frozenset({"relu", "relu6", "leaky_relu"})


def activate(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """activation(z), differentiable to any order."""
    if activation is None or activation == "none":
        return z
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return ACTIVATIONS[activation](z)


def check_activation(op: str, activation: str | None) -> None:
    """Raises ValueError for a name that no kernel knows."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
