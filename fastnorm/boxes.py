"""What one does with boxes: areas, overlaps, formats, clipping.  Differentiable, of any leading dimensions.

As torchvision does, integers are computed with in int32 or wider; float16 and bfloat16 are in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

FORMATS = ("xyxy", "xywh", "cxcywh")


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """The areas of boxes: width times height.

    Args:
        boxes: (..., 4), of any dtype.
        fmt: "xyxy" (two corners), "xywh" (corner, width, height) or "cxcywh" (centre, width, height).

    Returns:
        Tensor: (...), float32 for float16 and bfloat16, int32 for smaller integers, else of the boxes' dtype.

    Raises:
        ValueError: for an unknown format.

    Source: ``torchvision.ops.box_area``.

    Example:
        >>> box_area(torch.tensor([[0.0, 0, 2, 3]]))
        tensor([6.])
    """
    if has_torch_function((boxes,)):
        return handle_torch_function(box_area, (boxes,), boxes, fmt)
    _check_format(fmt, "box_area")
    return _area(_upcast(boxes).unbind(-1), fmt)


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    r"""Intersection over union of every box of the first set with every one of the second.

    Args:
        boxes1: (..., N, 4), of any dtype.
        boxes2: (..., M, 4), of leading dimensions that go with those of boxes1.
        fmt: as :func:`box_area`'s.

    Returns:
        Tensor: (..., N, M), float64 for float64, else float32. Two boxes without area have NaN.

    Raises:
        ValueError: for an unknown format.

    Source: ``torchvision.ops.box_iou``.

    Example:
        >>> box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]]))
        tensor([[0.3333, 0.0000]])
    """
    if has_torch_function((boxes1, boxes2)):
        return handle_torch_function(box_iou, (boxes1, boxes2), boxes1, boxes2, fmt)
    _check_format(fmt, "box_iou")
    return _Pairs(boxes1, boxes2, fmt).iou()


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    r"""Generalized intersection over union of every box of the first set with every one of the second.

    .. math:: \mathrm{IoU} - \frac{\mathrm{hull} - \mathrm{union}}{\mathrm{hull}}

    with the area of the smallest box that holds both. Unlike the IoU it tells how far apart boxes are that do not meet.

    Args:
        boxes1: (..., N, 4), x1, y1, x2, y2, of any dtype.
        boxes2: (..., M, 4).

    Returns:
        Tensor: (..., N, M), float64 for float64, else float32.

    Source: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630; ``torchvision.ops.generalized_box_iou``.

    Example:
        >>> generalized_box_iou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[3.0, 0, 4, 1]]))
        tensor([[-0.5000]])
    """
    if has_torch_function((boxes1, boxes2)):
        return handle_torch_function(generalized_box_iou, (boxes1, boxes2), boxes1, boxes2)
    pairs = _Pairs(boxes1, boxes2, "xyxy")
    hull = pairs.hull()
    return pairs.iou().sub_((hull - pairs.union) / hull)


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Boxes in another format.

    Args:
        boxes: (..., 4).
        in_fmt: "xyxy" (two corners), "xywh" (corner, width, height) or "cxcywh" (centre, width, height).
        out_fmt: likewise.

    Returns:
        Tensor: (..., 4), a copy. Of integers, centres and what is computed from centres are float32.

    Raises:
        ValueError: for an unknown format.

    Source: ``torchvision.ops.box_convert``.

    Example:
        >>> box_convert(torch.tensor([[0.0, 0, 2, 4]]), "xyxy", "cxcywh")
        tensor([[1., 2., 2., 4.]])
    """
    if has_torch_function((boxes,)):
        return handle_torch_function(box_convert, (boxes,), boxes, in_fmt, out_fmt)
    _check_format(in_fmt, "box_convert")
    _check_format(out_fmt, "box_convert")
    if in_fmt == out_fmt:
        return boxes.clone()
    corners = _corners(boxes.unbind(-1), in_fmt)
    if out_fmt == "xyxy":
        return torch.stack(corners, -1)
    x1, y1, x2, y2 = corners
    if out_fmt == "xywh":
        return torch.stack((x1, y1, x2 - x1, y2 - y1), -1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes cut off at the edges of an image.

    Args:
        boxes: (..., 4), x1, y1, x2, y2.
        size: (height, width) of the image.

    Returns:
        Tensor: (..., 4), of the boxes' dtype.

    Source: ``torchvision.ops.clip_boxes_to_image``.

    Example:
        >>> clip_boxes_to_image(torch.tensor([[-1.0, 2, 9, 9]]), (5, 8))
        tensor([[0., 2., 8., 5.]])
    """
    if has_torch_function((boxes,)):
        return handle_torch_function(clip_boxes_to_image, (boxes,), boxes, size)
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    x1, x2 = (x.clamp(min=0, max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0, max=height) for y in (y1, y2))
    return torch.stack((x1, y1, x2, y2), -1)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Which boxes have both sides at least this long.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        min_size: the length.

    Returns:
        Tensor: (K,) int64, their indices.

    Source: ``torchvision.ops.remove_small_boxes``.

    Example:
        >>> remove_small_boxes(torch.tensor([[0.0, 0, 9, 1], [0, 0, 5, 5]]), 2)
        tensor([1])
    """
    if has_torch_function((boxes,)):
        return handle_torch_function(remove_small_boxes, (boxes,), boxes, min_size)
    width, height = _size(boxes.unbind(-1), "xyxy")
    return torch.where((width >= min_size) & (height >= min_size))[0]


def _check_format(fmt: str, op: str) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"{op}: the format must be one of {', '.join(FORMATS)}, got {fmt}")


def _upcast(t: Tensor) -> Tensor:
    """To a type in which areas do not overflow."""
    if t.is_floating_point():
        return t.float() if t.dtype.itemsize == 2 else t
    return t if t.dtype in (torch.int32, torch.int64) else t.int()


Four = tuple[Tensor, Tensor, Tensor, Tensor]  # the numbers of boxes


def _size(boxes: Four, fmt: str) -> tuple[Tensor, Tensor]:
    return (boxes[2] - boxes[0], boxes[3] - boxes[1]) if fmt == "xyxy" else boxes[2:]


def _area(boxes: Four, fmt: str) -> Tensor:
    return torch.mul(*_size(boxes, fmt))


def _corners(boxes: Four, fmt: str) -> Four:
    x, y, width, height = boxes
    if fmt == "xyxy":
        return boxes
    if fmt == "xywh":
        return x, y, x + width, y + height
    return x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height


class _Pairs:
    """Areas of all pairs of boxes, each with a row (first set) and a column (second set).

    Each of the four numbers is a plane of its own, so that what is computed for the pairs is a row of vectors, and in
    place where that is nobody else's.
    """

    def __init__(self, boxes1: Tensor, boxes2: Tensor, fmt: str) -> None:
        one, two = (
            _upcast(b).movedim(-1, 0).unsqueeze(at).contiguous().unbind(0) for b, at in ((boxes1, -1), (boxes2, -2))
        )
        self.one, self.two = _corners(one, fmt), _corners(two, fmt)
        self.both = self._product(torch.min, torch.max)
        area1, area2 = (_area(b, fmt).to(self.both.dtype) for b in (one, two))  # integers' centres are not integers
        self.union = (area1 + area2).sub_(self.both)

    def hull(self) -> Tensor:
        return self._product(torch.max, torch.min)

    def iou(self) -> Tensor:
        return self.both / self.union

    def _product(self, end: Callable[..., Tensor], begin: Callable[..., Tensor]) -> Tensor:
        """Width times height, from the begin() of two boxes' first corners to the end() of the others."""
        width, height = (
            end(self.one[i + 2], self.two[i + 2]).sub_(begin(self.one[i], self.two[i])).clamp_min_(0) for i in (0, 1)
        )
        return width * height
