"""Convolution's cases: layers of real networks, each pass by every algorithm, torch's own beside it.

`auto` is what fastnorm takes; the other rows show what it chose from. With --precision high, as with
torch.set_float32_matmul_precision("high"), Winograd's with 4x4 tiles is among that. The share of copy is that of the
fewest bytes, which few convolutions are bound by.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import Conv2d
from fastnorm.functional import conv2d

from .common import Case
from .norms import theirs

# (n, ci, co, height and width), (kernel, stride, padding, groups)
SHAPES = {
    ((32, 64, 64, 56), (3, 1, 1, 1)): "ResNet and VGG",
    ((32, 128, 128, 28), (3, 1, 1, 1)): "",
    ((32, 256, 256, 14), (3, 1, 1, 1)): "",
    ((32, 512, 512, 7), (3, 1, 1, 1)): "",
    ((16, 128, 32, 28), (3, 1, 1, 1)): "DenseNet's growth",
    ((16, 64, 128, 56), (3, 2, 1, 1)): "ResNet, first of a stage",
    ((16, 256, 512, 14), (3, 2, 1, 1)): "",
    ((16, 64, 256, 56), (1, 1, 0, 1)): "ResNet-50's bottlenecks",
    ((16, 256, 64, 56), (1, 1, 0, 1)): "",
    ((16, 512, 128, 28), (1, 1, 0, 1)): "",
    ((16, 512, 512, 14), (1, 1, 0, 1)): "",
    ((16, 256, 512, 28), (1, 2, 0, 1)): "ResNet's shortcuts",
    ((16, 3, 64, 224), (7, 2, 3, 1)): "ResNet's stem",
    ((8, 3, 64, 224), (3, 1, 1, 1)): "VGG's first",
    ((64, 3, 64, 32), (3, 1, 1, 1)): "first layer of small images",
    ((64, 1, 6, 28), (5, 1, 2, 1)): "LeNet",
    ((64, 3, 6, 32), (5, 1, 0, 1)): "LeNet in colour",
    ((64, 6, 16, 14), (5, 1, 0, 1)): "LeNet's second",
    ((16, 192, 192, 27), (5, 1, 2, 1)): "AlexNet's second",
    ((64, 16, 16, 32), (3, 1, 1, 1)): "ResNet for small images",
    ((16, 128, 128, 56), (3, 1, 1, 32)): "ResNeXt, its stages",
    ((16, 512, 512, 14), (3, 1, 1, 32)): "",
    ((16, 1024, 1024, 14), (3, 2, 1, 32)): "",
    ((32, 96, 96, 56), (3, 1, 1, 96)): "depthwise",
    ((32, 144, 144, 56), (3, 2, 1, 144)): "",
    ((32, 672, 672, 14), (5, 2, 2, 672)): "",
    ((32, 960, 960, 7), (3, 1, 1, 960)): "",
    ((16, 96, 96, 56), (7, 1, 3, 96)): "ConvNeXt, its stages",
    ((16, 384, 384, 14), (7, 1, 3, 384)): "",
    ((16, 768, 768, 7), (7, 1, 3, 768)): "",
}
QUICK = (((32, 64, 64, 56), (3, 1, 1, 1)),)


def algorithms(shape: tuple, window: tuple) -> Iterator[str]:
    """Those that are worth a look for a shape."""
    yield "auto"
    (_, ci, co, _), (kernel, stride, _, groups) = shape, window
    yield "depthwise" if groups == ci == co else "im2col"
    if min(ci, co) // groups <= 16:
        yield "direct"
    if kernel == 3 and stride == 1 and groups == 1:
        yield "winograd_2x2"
        yield "winograd"


class Bench:
    """One shape and window."""

    def __init__(self, shape: tuple, window: tuple, device: str, dtype: str, layout: str, against: list[str]):
        generator = torch.Generator(device).manual_seed(0)
        (n, ci, co, size), (kernel, self.stride, self.padding, self.groups) = shape, window

        def tensor(*shape: int) -> Tensor:
            t = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
            return t.contiguous(memory_format=torch.channels_last) if layout == "nhwc" and t.dim() == 4 else t

        self.x, self.bias = tensor(n, ci, size, size), tensor(co)
        self.weight = tensor(co, ci // self.groups, kernel, kernel)
        self.dy = tensor(*self.reference(self.x, self.weight, self.bias).shape)
        self.name = f"{ci}->{co} {kernel}x{kernel} s{self.stride}" + (f" g{self.groups}" if self.groups > 1 else "")
        self.dtype, self.layout, self.against = dtype, layout, against

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)

    def case(self, what: str, floor: int, run: Callable, ours: Any, eager: Any, tolerance: float) -> Case:
        target, size = torch.empty_like(self.x), self.x.numel() * self.x.element_size()
        tolerance = 2e-2 if self.x.element_size() == 2 else tolerance
        return Case(
            "conv2d", tuple(self.x.shape), self.layout, self.dtype, f"{self.name} {what}", floor,
            lambda: run(ours), theirs(run, eager, self.against), tolerance,
            lambda: target.copy_(self.x), 2 * size,
        )  # fmt: skip

    def cases(self, algorithm: str) -> Iterator[Case]:
        x, weight, bias, dy = self.x, self.weight, self.bias, self.dy
        bytes_of = x.element_size()
        floor = (x.numel() + weight.numel() + dy.numel()) * bytes_of
        approximate = algorithm == "winograd" or torch.get_float32_matmul_precision() != "highest"
        tolerance = 3e-5 if approximate else 3e-6

        window = ([self.stride], [self.padding], [1], self.groups)

        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups, algorithm=algorithm)

        def backward(dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
            results = torch.ops.fastnorm.conv2d_backward(dy, x, weight, *window, algorithm, mask)
            return tuple(t for t, wanted in zip(results, mask, strict=True) if wanted)

        def eager_backward(dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
            stride, padding, dilation, groups = window
            results = torch.ops.aten.convolution_backward(
                dy, x, weight, [len(weight)], stride * 2, padding * 2, dilation * 2, False, [0, 0], groups, mask
            )
            return tuple(t for t, wanted in zip(results, mask, strict=True) if wanted)

        yield self.case(f"{algorithm} forward", floor, lambda f: f(x, weight, bias), forward, self.reference, tolerance)
        for name, mask in (("to input", [True, False, False]), ("to weight", [False, True, True])):
            if name == "to input" and x.shape[1] <= 3:
                continue  # nobody asks for the gradient to an image
            digits = tolerance * (10 if name == "to weight" else 1)  # sums over all pixels
            yield self.case(f"{algorithm} {name}", floor, lambda f, m=mask: f(dy, x, weight, m), backward,
                            eager_backward, digits)  # fmt: skip


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape, window in QUICK if quick else SHAPES:
        bench = Bench(shape, window, device, dtype, layout, against)
        for algorithm in ("auto",) if quick or dtype != "float32" else algorithms(shape, window):
            yield from bench.cases(algorithm)
    if layout == "nchw" and not quick:  # what a call costs beside the work
        bench = Bench((1, 2, 2, 4), (1, 1, 0, 1), device, dtype, layout, [a for a in against if a == "eager"])
        ours, eager = Conv2d(2, 2, 1, device=device), torch.nn.Conv2d(2, 2, 1, device=device)
        eager.load_state_dict(ours.state_dict())
        leaf = bench.x.clone().requires_grad_()
        dtype_of = getattr(torch, dtype)
        ours, eager = ours.to(dtype_of), eager.to(dtype_of)

        def module_forward(module: torch.nn.Module) -> Tensor:
            with torch.no_grad():
                return module(bench.x)

        def module_both(module: torch.nn.Module) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(leaf), [leaf, *module.parameters()], bench.dy)

        for name, run in (("forward", module_forward), ("both", module_both)):
            yield bench.case(f"module call, {name}", 1, run, ours, eager, 1e-5)
