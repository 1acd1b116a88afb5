"""Average pooling's cases: shapes of real networks, forward and backward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastnorm import AvgPool2d
from fastnorm.functional import avg_pool2d

from .common import Case
from .pools import Bench

# shape, (kernel, stride, padding)
SHAPES = {
    ((64, 6, 28, 28), (2, 2, 0)): "LeNet, first",
    ((64, 16, 10, 10), (2, 2, 0)): "LeNet, second",
    ((16, 256, 32, 32), (2, 2, 0)): "DenseNet of small images, first transition",
    ((32, 256, 56, 56), (2, 2, 0)): "DenseNet, first transition",
    ((16, 192, 28, 28), (3, 1, 1)): "Inception, in its blocks",
    ((32, 512, 7, 7), (7, 7, 0)): "before the last layer of many",
}
QUICK = (((16, 256, 32, 32), (2, 2, 0)),)
FUNCTIONS = (avg_pool2d, F.avg_pool2d)


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for shape, window in QUICK if quick else SHAPES:
        bench = Bench("avg_pool2d", FUNCTIONS, shape, window, device, dtype, layout, against)
        floor = (bench.x.numel() + bench.y.numel()) * bench.x.element_size()
        yield bench.forward_case("forward", floor)
        yield from bench.gradient_cases(floor)
    if layout == "nchw" and not quick:
        eager = [a for a in against if a == "eager"]
        bench = Bench("avg_pool2d", FUNCTIONS, (1, 4, 8, 8), (2, 2, 0), device, dtype, layout, eager)
        yield from bench.call_cases(AvgPool2d(2), torch.nn.AvgPool2d(2))
