"""What the operators are held to: float64 formulas, and the one rule for how far off a result may be.

An error is the largest difference from the oracle's result over the largest entry of that.  fastnorm's may be twice
what torch's own operators show for the same inputs and dtype, plus a floor of a few roundings of the result's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ACTIVATIONS = (
    None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "hardswish",
)  # fmt: skip
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "elu": (0,), "hardswish": (-3, 3)}


def activate(z: Tensor, activation: str | None, slope: float = 0.01) -> Tensor:
    zero = torch.zeros((), dtype=z.dtype)
    match activation:
        case None:
            return z
        case "relu":
            return torch.where(z > 0, z, zero)
        case "relu6":
            return torch.where(z > 6, zero + 6, torch.where(z > 0, z, zero))
        case "leaky_relu":
            return torch.where(z > 0, z, slope * z)
        case "elu":
            return torch.where(z > 0, z, torch.expm1(torch.where(z > 0, zero, z)))
        case "sigmoid":
            return 1 / (1 + torch.exp(-z))
        case "tanh":
            return 1 - 2 / (torch.exp(2 * z) + 1)
        case "silu":
            return z / (1 + torch.exp(-z))
        case "gelu":
            return z * (1 + torch.erf(z / math.sqrt(2))) / 2
        case "gelu_tanh":
            return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
        case "hardswish":
            return torch.where(z >= 3, z, torch.where(z <= -3, zero, z * (z + 3) / 6))
    raise ValueError(activation)


@dataclass
class Arguments:
    """Of batch_norm, in the dtypes under test."""

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str | None = None
    negative_slope: float = 0.01
    dy: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "residual", "weight", "bias", "running_mean", "running_var")
        return {n: t for n in names if (t := getattr(self, n)) is not None}


@dataclass
class Results:
    y: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        named = {"y": self.y, "running_mean": self.running_mean, "running_var": self.running_var}
        return {n: t for n, t in named.items() if t is not None} | {f"d{n}": g for n, g in self.gradients.items()}


def evaluate(function, a: Arguments, dtype: torch.dtype | None = None) -> Results:
    """Runs function(Arguments) -> y on copies (in `dtype`, on the CPU, where it is given), and its backward pass."""
    copies = {}
    for name, t in a.tensors().items():
        t = t.detach()
        t = t.clone() if dtype is None else t.cpu().to(dtype, copy=True)
        copies[name] = t if name.startswith("running") else t.requires_grad_()
    b = Arguments(**{**a.__dict__, **copies})
    y = function(b)
    results = Results(y.detach(), b.running_mean, b.running_var)
    if a.dy is not None:
        wanted = [n for n in copies if not n.startswith("running")]
        dy = a.dy if dtype is None else a.dy.cpu().to(dtype)
        gradients = torch.autograd.grad(y, [copies[n] for n in wanted], dy)
        results.gradients = dict(zip(wanted, gradients, strict=True))
    return results


def normalized(a: Arguments) -> Tensor:
    """What the activation is applied to, from float64 arguments; updates the running statistics."""
    dims = [d for d in range(a.x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(a.x.dim())]
    if a.training:
        count = a.x.numel() / a.x.shape[1]
        mean = a.x.sum(dims) / count
        var = ((a.x - mean.view(shape)) ** 2).sum(dims) / count
        if a.running_mean is not None:
            with torch.no_grad():
                a.running_mean += a.momentum * (mean - a.running_mean)
                a.running_var += a.momentum * (var * count / (count - 1) - a.running_var)
    else:
        mean, var = a.running_mean, a.running_var
    z = (a.x - mean.view(shape)) / torch.sqrt(var.view(shape) + a.eps)
    if a.weight is not None:
        z = z * a.weight.view(shape)
    if a.bias is not None:
        z = z + a.bias.view(shape)
    return z if a.residual is None else z + a.residual


def oracle(a: Arguments) -> Results:
    return evaluate(lambda b: activate(normalized(b), b.activation, b.negative_slope), a, torch.float64)


def keep_off_kinks(a: Arguments) -> None:
    """Zeroes dy where the activation's argument is so near a kink that roundings decide on the slope."""
    margin = 50 * torch.finfo(a.x.dtype).eps
    with torch.no_grad():
        copies = {n: t.detach().cpu().to(torch.float64, copy=True) for n, t in a.tensors().items()}
        z = normalized(Arguments(**{**a.__dict__, **copies}))
    for kink in KINKS.get(a.activation, ()):
        a.dy = a.dy.masked_fill(((z - kink).abs() < margin * (1 + abs(kink))).to(a.dy.device), 0)


def error(result: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest entry; infinite where one is finite and the other not."""
    assert result.shape == exact.shape, f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    if exact.numel() == 0:
        return 0.0
    same = (result == exact) | (result.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (result - exact).abs()).nan_to_num(nan=math.inf)
    scale = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    return (difference.max() / max(scale, 1e-30)).item() if difference.any() else 0.0


def check(ours: Results, torchs: Results, exact: Results, slack: float = 1.0) -> None:
    """The tolerance rule, for every result."""
    a, b, c = ours.tensors(), torchs.tensors(), exact.tensors()
    assert a.keys() == c.keys()
    for name, result in a.items():
        assert result.dtype == b[name].dtype, f"{name} is {result.dtype} instead of {b[name].dtype}"
        floor = (
            slack * (64 if result.dtype == torch.float64 else 4) * torch.finfo(result.dtype).eps
        )  # the oracle is float64
        if name.startswith("d") and result.dtype.itemsize > 2:
            floor *= 4  # sums over a whole channel, of terms that cancel
        allowed = 2 * error(b[name], c[name]) + floor
        assert error(result, c[name]) <= allowed, f"{name}: error {error(result, c[name]):.2e}, allowed {allowed:.2e}"
