"""Batch norm's cases: shapes of real networks, fused and plain, forward and backward, training and evaluation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastnorm
from fastnorm.functional import batch_norm

from .common import Case

SHAPES = {
    (64, 6, 28, 28): "LeNet, first block",
    (32, 64, 56, 56): "ResNet-50, first stage",
    (32, 256, 14, 14): "ResNet-50, third stage",
    (32, 512, 7, 7): "ResNet-50, last stage",
}
QUICK_SHAPES = ((64, 6, 28, 28), (32, 64, 56, 56))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# relu's slope where z is about 0 is decided by rounding: in a few elements the two sides differ rightly.
KINKS = {"float64": 1e-2, "float32": 1e-2, "float16": 3e-2, "bfloat16": 1e-1}


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        yield from _shape_cases(shape, device, dtype, layout, against, quick)
    if layout == "nchw" and not quick:
        yield from _call_cases(device, dtype, against)


def _theirs(run, function, against: list[str]):
    """What `run` does with torch's function, as it is and compiled."""
    made = {"eager": lambda: function, "compile": lambda: torch.compile(function, dynamic=False)}
    functions = {name: made[name]() for name in against}
    return {name: (lambda f=f: run(f)) for name, f in functions.items()}


def _shape_cases(shape, device, dtype_name, layout, against, quick) -> Iterator[Case]:
    dtype = getattr(torch, dtype_name)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)

    def tensor() -> torch.Tensor:
        t = torch.randn(shape, generator=generator, device=device).to(dtype)
        return t.contiguous(memory_format=memory_format)

    c = shape[1]
    x, residual, dy = tensor(), tensor(), tensor()
    weight = torch.rand(c, generator=generator, device=device) + 0.5
    bias = torch.randn(c, generator=generator, device=device)
    weight, bias = weight.to(dtype), bias.to(dtype)
    running = {True: (None, None), False: (torch.zeros_like(weight), torch.ones_like(weight))}
    size = x.numel() * x.element_size()
    target = torch.empty_like(x)

    def eager(x, weight, bias, training, activation, residual):
        y = F.batch_norm(x, *running[training], weight, bias, training)
        if residual is not None:
            y = y + residual
        return F.relu(y) if activation else y

    def ours(x, weight, bias, training, activation, residual):
        return batch_norm(x, *running[training], weight, bias, training, activation=activation, residual=residual)

    def case(what, passes, run, tolerance=TOLERANCE):
        return Case(
            "batch_norm", shape, layout, dtype_name, what, passes * size, lambda: run(ours),
            _theirs(run, eager, against), tolerance[dtype_name], lambda: target.copy_(x), 2 * size,
        )  # fmt: skip

    def forward(training, activation, added):
        def run(f):
            with torch.no_grad():
                return f(x, weight, bias, training, activation, added)

        return run

    def backward(activation, added, whole):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        if added is not None:
            added = added.detach().clone().requires_grad_()
        wanted = leaves + ([added] if added is not None else [])
        kept = {}

        def run(f):
            if whole:
                return torch.autograd.grad(f(*leaves, True, activation, added), wanted, dy)
            if f not in kept:
                kept[f] = f(*leaves, True, activation, added)
            return torch.autograd.grad(kept[f], wanted, dy, retain_graph=True)

        return run

    yield case("forward", 2, forward(True, None, None))
    yield case("forward + relu", 2, forward(True, "relu", None))
    yield case("forward + residual + relu", 3, forward(True, "relu", residual))
    if quick:
        return
    yield case("eval", 2, forward(False, None, None))
    yield case("eval + relu", 2, forward(False, "relu", None))
    yield case("eval + residual + relu", 3, forward(False, "relu", residual))
    yield case("backward", 3, backward(None, None, False))
    yield case("backward + residual + relu", 4, backward("relu", residual, False), KINKS)
    yield case("both + relu", 5, backward("relu", None, True), KINKS)
    yield case("both + residual + relu", 7, backward("relu", residual, True), KINKS)


def _call_cases(device, dtype_name, against) -> Iterator[Case]:
    """What a call costs beside the work: modules on a tiny tensor."""
    dtype = getattr(torch, dtype_name)
    x = torch.randn(4, 8, device=device, dtype=dtype)
    grad, dy = x.clone().requires_grad_(), torch.randn_like(x)
    ours, theirs = (m(8, device=device, dtype=dtype) for m in (fastnorm.BatchNorm1d, torch.nn.BatchNorm1d))
    target = torch.empty_like(x)
    size = x.numel() * x.element_size()

    def case(what, passes, run):
        return Case(
            "batch_norm", (4, 8), "nchw", dtype_name, what, passes * size, lambda: run(ours),
            _theirs(run, theirs, [a for a in against if a == "eager"]), TOLERANCE[dtype_name],
            lambda: target.copy_(x), 2 * size,
        )  # fmt: skip

    def forward(module):
        with torch.no_grad():
            return module(x)

    yield case("module call, forward", 2, forward)
    yield case("module call, forward + backward", 5, lambda m: torch.autograd.grad(m(grad), grad, dy))
