"""NMS's cases: a scalar C++ loop on the CPU, and torchvision's operators where it is installed; those (or the same in
torch) on a GPU."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastnorm.ops import batched_nms, box_iou, nms, nms_padded

from .common import Case, torchvision

SIZES = (1000, 5000, 10_000)
THRESHOLD = 0.5
CLASSES = 80


def scene(n: int, kind: str, device: str, dtype: str) -> tuple[Tensor, Tensor]:
    """dense: boxes all over an image, most of which are kept; clustered: many guesses for each of a few objects."""
    generator = torch.Generator().manual_seed(0)
    rand, randn = (lambda *s, f=f: f(s, generator=generator) for f in (torch.rand, torch.randn))
    if kind == "dense":
        corner, size = rand(n, 2) * 1000, rand(n, 2) * 60 + 10
    else:
        objects = n // 50
        which = torch.randint(objects, (n,), generator=generator)
        corner, size = rand(objects, 2)[which] * 1000, (rand(objects, 2) * 100 + 20)[which]
        corner, size = corner + randn(n, 2) * 0.1 * size, size * (1 + 0.1 * randn(n, 2)).clamp(min=0.5)
    scores = torch.randperm(n, generator=generator) / n  # no two are equal: torchvision's order of such is any
    return tuple(t.to(device, getattr(torch, dtype)) for t in (torch.cat([corner, corner + size], 1), scores))


@cache
def scalar() -> Callable:
    from torch.utils.cpp_extension import load

    source = str(Path(__file__).with_name("nms_baseline.cpp"))
    return load("fastnorm_nms_baseline", [source], extra_cflags=["-O3", "-ffp-contract=off"]).nms


def matrix(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """All pairs on the GPU, then a loop on the host."""
    order = scores.sort(descending=True, stable=True)[1]
    over = (box_iou(boxes[order], boxes[order]) > threshold).triu(1).cpu()
    gone, keep = torch.zeros(len(order), dtype=torch.bool), []
    for i in range(len(order)):
        if not gone[i]:
            keep.append(i)
            gone |= over[i]
    return order[keep]


def baseline(device: str) -> Callable:
    if device == "cpu":
        return scalar()
    library = torchvision()
    return library.ops.nms if library else matrix


def by_class(function: Callable, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
    keep = torch.cat(
        [where[function(boxes[where], scores[where], THRESHOLD)]
         for where in ((idxs == c).nonzero()[:, 0] for c in idxs.unique())]
    )  # fmt: skip
    keep = keep.sort()[0]
    return keep[scores[keep].sort(descending=True, stable=True)[1]]


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Boxes have no layout: under "nchw" only; against "eager" only."""
    if layout != "nchw" or "eager" not in against or dtype != "float32":
        return
    theirs, library = baseline(device), torchvision() if device == "cpu" else None
    for n in SIZES[:1] if quick else SIZES:
        for kind in ("dense", "clustered"):
            boxes, scores = scene(n, kind, device, dtype)
            target = torch.empty_like(boxes)
            idxs = torch.randint(CLASSES, (n,), device=device)
            size = 4 * boxes.numel() * boxes.element_size() // 4

            def case(
                what: str, ours: Callable, other: Callable, third: Callable | None = None,
                n=n, boxes=boxes, target=target, size=size,
            ) -> Case:  # fmt: skip
                others = {"eager": other} | ({"torchvision": third} if library and third else {})
                copy = lambda: target.copy_(boxes)  # noqa: E731
                return Case("nms", (n, 4), "-", dtype, what, size * 5 // 4, ours, others, 0.0, copy, 2 * size)

            one = lambda f, b=boxes, s=scores: f(b, s, THRESHOLD)  # noqa: E731
            yield case(kind, lambda f=one: f(nms), lambda f=one: f(theirs), lambda f=one: f(library.ops.nms))
            if device == "cuda":
                count = len(one(nms))
                padded = lambda f=one, c=count: f(nms_padded)[0][:c]  # noqa: E731
                yield case(f"{kind}, padded", padded, lambda f=one: f(theirs))
            yield case(
                f"{kind}, {CLASSES} classes",
                lambda b=boxes, s=scores, i=idxs: batched_nms(b, s, i, THRESHOLD),
                lambda b=boxes, s=scores, i=idxs: by_class(theirs, b, s, i),
                lambda b=boxes, s=scores, i=idxs: library.ops.batched_nms(b, s, i, THRESHOLD),
            )
