"""The cases of what is computed for all pairs of boxes, against torchvision's functions where it is installed."""

from collections.abc import Iterator
from functools import partial

import torch

from fastnorm import ops

from .common import Case, torchvision
from .nms import scene

SIZES = ((20, 100), (1000, 500), (8732, 20))  # the last: an SSD's anchors and an image's objects


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Boxes have no layout: under "nchw" only; against "eager" only."""
    library = torchvision()
    if layout != "nchw" or "eager" not in against or dtype != "float32" or library is None:
        return
    for n, m in SIZES[:1] if quick else SIZES:
        one, two = (scene(k, "dense", device, dtype)[0] for k in (n, m))
        pairs, target = torch.rand(n, m, device=device), torch.empty(n, m, device=device)
        size = pairs.numel() * pairs.element_size()
        for name in ("box_iou", "generalized_box_iou"):
            ours, theirs = (partial(getattr(place, name), one, two) for place in (ops, library.ops))
            copy = partial(target.copy_, pairs)
            yield Case(name, (n, m), "-", dtype, "forward", size, ours, {"torchvision": theirs}, 1e-6, copy, 2 * size)
