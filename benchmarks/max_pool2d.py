"""Max-pooling's cases: shapes of real networks, with indices and without, forward and backward, and unpooling."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastnorm import MaxPool2d
from fastnorm.functional import max_pool2d, max_unpool2d

from .common import Case
from .pools import Bench

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


FUNCTIONS = (max_pool2d, F.max_pool2d)


def unpool_case(bench: Bench) -> Case:
    kernel, stride, padding, *_ = bench.window
    y, indices = F.max_pool2d(bench.x, *bench.window, return_indices=True)
    arguments = (y, indices, kernel, stride, padding, tuple(bench.x.shape))
    floor = (bench.x.numel() + y.numel()) * y.element_size() + 8 * y.numel()
    return bench.case("unpool", floor, lambda f: f(*arguments), max_unpool2d, F.max_unpool2d, "max_unpool2d")


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape, window in QUICK if quick else SHAPES:
        bench = Bench("max_pool2d", FUNCTIONS, shape, window, device, dtype, layout, against)
        floor = (bench.x.numel() + bench.y.numel()) * bench.x.element_size()
        yield bench.forward_case("forward", floor)
        yield bench.forward_case("forward, indices", floor + 8 * bench.y.numel(), return_indices=True)
        yield from bench.gradient_cases(floor + bench.y.numel())  # with the offsets that backward reads
        if window[:2] == (2, 2) and not quick:  # elsewhere windows overlap, and what torch's CUDA takes is open
            yield unpool_case(bench)
    if layout == "nchw" and not quick:
        eager = [a for a in against if a == "eager"]
        bench = Bench("max_pool2d", FUNCTIONS, (1, 4, 8, 8), (2, 2, 0, 1, False), device, dtype, layout, eager)
        yield from bench.call_cases(MaxPool2d(2), torch.nn.MaxPool2d(2))
