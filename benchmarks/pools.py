"""What the poolings' benchmarks share: inputs, and how forward, backward and module calls are run on both sides."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .common import Case
from .norms import theirs


class Bench:
    """One shape and window of a pooling. Functions take the input and the window, which begins (kernel, stride)."""

    def __init__(self, op: str, functions: tuple[Callable, Callable], shape: tuple[int, ...], window: tuple,
                 device: str, dtype: str, layout: str, against: list[str]):  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)

        def tensor(shape: tuple[int, ...]) -> Tensor:
            t = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
            return t.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else t

        self.op, self.functions = op, functions
        self.dtype, self.layout, self.window, self.against = dtype, layout, window, against
        self.x = tensor(shape)
        self.y = functions[1](self.x, *window)
        self.dy = tensor(tuple(self.y.shape))

    def case(self, what: str, floor: int, run: Callable, ours: Any, eager: Any, op: str | None = None) -> Case:
        target = torch.empty_like(self.x)
        size = self.x.numel() * self.x.element_size()
        kernel, stride, *_ = self.window
        tolerance = 1e-2 if self.x.element_size() == 2 else 1e-6  # torch rounds sums of 16-bit gradients
        return Case(
            op or self.op, tuple(self.x.shape), self.layout, self.dtype, f"{kernel}x{kernel} s{stride} {what}", floor,
            lambda: run(ours), theirs(run, eager, self.against), tolerance, lambda: target.copy_(self.x), 2 * size,
        )  # fmt: skip

    def forward_case(self, what: str, floor: int, **keywords: Any) -> Case:
        def run(f: Callable) -> Any:
            with torch.no_grad():
                return f(self.x, *self.window, **keywords)

        return self.case(what, floor, run, *self.functions)

    def gradient_cases(self, floor: int) -> Iterator[Case]:
        """floor: of the backward pass, and half of both passes'."""
        x, dy, kept = self.x.clone().requires_grad_(), self.dy, {}

        def backward(f: Callable) -> tuple[Tensor, ...]:
            if f not in kept:
                kept[f] = f(x, *self.window)
            return torch.autograd.grad(kept[f], x, dy, retain_graph=True)

        def both(f: Callable) -> tuple[Tensor, ...]:
            return torch.autograd.grad(f(x, *self.window), x, dy)

        yield self.case("backward", floor, backward, *self.functions)
        yield self.case("both", 2 * floor, both, *self.functions)

    def call_cases(self, ours: nn.Module, eager: nn.Module) -> Iterator[Case]:
        """What a call costs beside the work."""
        leaf = self.x.clone().requires_grad_()

        def module_forward(module: nn.Module) -> Tensor:
            with torch.no_grad():
                return module(self.x)

        def module_both(module: nn.Module) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(leaf), leaf, self.dy)

        for name, run in (("forward", module_forward), ("both", module_both)):
            yield self.case(f"module call, {name}", 1, run, ours, eager)
