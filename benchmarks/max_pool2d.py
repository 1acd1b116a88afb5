"""Max-pooling's cases: shapes of real networks, with indices and without, forward and backward, and unpooling."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import MaxPool2d
from fastnorm.functional import max_pool2d, max_unpool2d

from .common import Case
from .norms import theirs

# shape, (kernel, stride, padding, dilation, ceil_mode)
SHAPES = {
    ((32, 64, 112, 112), (3, 2, 1, 1, False)): "ResNet-50's stem",
    ((32, 64, 56, 56), (2, 2, 0, 1, False)): "VGG-16, second block",
    ((32, 192, 56, 56), (3, 2, 0, 1, True)): "GoogLeNet, before its Inception blocks",
    ((32, 192, 28, 28), (3, 1, 1, 1, False)): "GoogLeNet, inside of one",
    ((64, 64, 55, 55), (3, 2, 0, 1, False)): "AlexNet, first",
    ((64, 6, 28, 28), (2, 2, 0, 1, False)): "LeNet, first",
}
QUICK = (((32, 64, 112, 112), (3, 2, 1, 1, False)),)


class Bench:
    """One shape and window."""

    def __init__(self, shape: tuple[int, ...], window: tuple, device: str, dtype: str, layout: str, against: list[str]):
        generator = torch.Generator(device).manual_seed(0)

        def tensor(shape: tuple[int, ...]) -> Tensor:
            t = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
            return t.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else t

        self.x = tensor(shape)
        self.y, self.indices = F.max_pool2d(self.x, *window, return_indices=True)
        self.dy = tensor(tuple(self.y.shape))
        self.dtype, self.layout, self.window, self.against = dtype, layout, window, against

    def case(self, what: str, floor: int, run: Callable, ours: Any, eager: Any, op: str = "max_pool2d") -> Case:
        target = torch.empty_like(self.x)
        size = self.x.numel() * self.x.element_size()
        kernel, stride, *_ = self.window
        tolerance = 1e-2 if self.x.element_size() == 2 else 1e-6  # torch rounds sums of 16-bit gradients
        return Case(
            op, tuple(self.x.shape), self.layout, self.dtype, f"{kernel}x{kernel} s{stride} {what}", floor,
            lambda: run(ours), theirs(run, eager, self.against), tolerance, lambda: target.copy_(self.x), 2 * size,
        )  # fmt: skip

    def cases(self) -> Iterator[Case]:
        x, y, dy, window = self.x, self.y, self.dy, self.window
        leaf, kept = x.clone().requires_grad_(), {}
        forward = (x.numel() + y.numel()) * x.element_size()
        kept_bytes = forward + y.numel()  # with the offsets that backward reads

        def ours(x: Tensor, return_indices: bool = False) -> Any:
            return max_pool2d(x, *window, return_indices=return_indices)

        def eager(x: Tensor, return_indices: bool = False) -> Any:
            return F.max_pool2d(x, *window, return_indices=return_indices)

        def pool(f: Callable) -> Tensor:
            with torch.no_grad():
                return f(x)

        def with_indices(f: Callable) -> Any:
            with torch.no_grad():
                return f(x, True)

        def backward(f: Callable) -> tuple[Tensor, ...]:
            if f not in kept:
                kept[f] = f(leaf)
            return torch.autograd.grad(kept[f], leaf, dy, retain_graph=True)

        def both(f: Callable) -> tuple[Tensor, ...]:
            return torch.autograd.grad(f(leaf), leaf, dy)

        yield self.case("forward", forward, pool, ours, eager)
        yield self.case("forward, indices", forward + 8 * y.numel(), with_indices, ours, eager)
        yield self.case("backward", kept_bytes, backward, ours, eager)
        yield self.case("both", 2 * kept_bytes, both, ours, eager)

    def unpool_case(self) -> Case:
        kernel, stride, padding, *_ = self.window
        arguments = (self.y, self.indices, kernel, stride, padding, tuple(self.x.shape))
        floor = (self.x.numel() + self.y.numel()) * self.x.element_size() + 8 * self.y.numel()
        return self.case("unpool", floor, lambda f: f(*arguments), max_unpool2d, F.max_unpool2d, "max_unpool2d")


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape, window in QUICK if quick else SHAPES:
        bench = Bench(shape, window, device, dtype, layout, against)
        yield from bench.cases()
        if window[:2] == (2, 2) and not quick:  # elsewhere windows overlap, and what torch's CUDA takes is open
            yield bench.unpool_case()
    if layout == "nchw" and not quick:  # what a call costs beside the work
        bench = Bench((1, 4, 8, 8), (2, 2, 0, 1, False), device, dtype, layout, [a for a in against if a == "eager"])
        leaf = bench.x.clone().requires_grad_()

        def module_forward(module: torch.nn.Module) -> Tensor:
            with torch.no_grad():
                return module(bench.x)

        def module_both(module: torch.nn.Module) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(leaf), leaf, bench.dy)

        for name, run in (("forward", module_forward), ("both", module_both)):
            yield bench.case(f"module call, {name}", 1, run, MaxPool2d(2), torch.nn.MaxPool2d(2))
