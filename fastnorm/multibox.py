"""Single-shot detection: anchor boxes, what they are to predict, and the boxes that predictions stand for.

As in chapter 14 of Zhang, Lipton, Li and Smola, Dive into Deep Learning, https://d2l.ai, for whole batches at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import box_convert, box_iou
from .nms import nms_padded

# How much of an anchor's size a centre is off by, and the logarithm of how much larger a box is, have standard
# deviations of about 0.1 and 0.2.
CENTER_SCALE, SIZE_SCALE = 10, 5


def multibox_prior(
    data: Tensor | tuple[int, int],
    sizes: Sequence[float],
    ratios: Sequence[float],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Anchor boxes of several sizes and aspect ratios, centred on every pixel.

    A pixel has an anchor of each size with the first ratio, then of the first size with each other ratio:
    :math:`(s_1, r_1), \ldots, (s_n, r_1), (s_1, r_2), \ldots, (s_1, r_m)`. With size s and ratio r it is
    :math:`h s \sqrt{r}` pixels wide and :math:`h s / \sqrt{r}` high, of an image of height h.

    Args:
        data: (..., H, W), an image or feature map whose pixels are meant and whose device is used; or (H, W) itself.
        sizes: shares of the image's height, n of them.
        ratios: width over height, m of them.
        device: of the result, if data is a size.
        dtype: of the result.

    Returns:
        Tensor: (1, H * W * (n + m - 1), 4), x1, y1, x2, y2 as shares of the image's width and height.

    Raises:
        ValueError: for no sizes or ratios, or ones that are not positive.

    Example:
        >>> multibox_prior((1, 2), sizes=[0.5], ratios=[1, 4])
        tensor([[[0.1250, 0.2500, 0.3750, 0.7500],
                 [0.0000, 0.3750, 0.5000, 0.6250],
                 [0.6250, 0.2500, 0.8750, 0.7500],
                 [0.5000, 0.3750, 1.0000, 0.6250]]])
    """
    for name, numbers in (("sizes", sizes), ("ratios", ratios)):
        if len(numbers) == 0 or min(numbers) <= 0:
            raise ValueError(f"multibox_prior: {name} must be positive numbers, got {list(numbers)}")
    if isinstance(data, Tensor):
        device, data = data.device, data.shape[-2:]
    height, width = data
    options = {"device": device, "dtype": dtype}
    size, ratio = torch.tensor(sizes, **options), torch.tensor(ratios, **options).sqrt()
    w = torch.cat((size * ratio[0], size[0] * ratio[1:])) * height / width
    h = torch.cat((size / ratio[0], size[0] / ratio[1:]))
    y, x = (((torch.arange(n, **options) + 0.5) * (1 / n)) for n in (height, width))
    y, x = y[:, None, None], x[None, :, None]
    corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return torch.stack([c.expand(height, width, len(w)) for c in corners], -1).reshape(1, -1, 4)


def multibox_target(anchors: Tensor, labels: Tensor, iou_threshold: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    r"""What each anchor is to predict: the class and the offsets of the ground-truth box that is assigned to it.

    Of all pairs of an anchor and a ground-truth box, the one with the largest IoU is assigned, then the largest among
    the anchors and boxes that are left, until each box has an anchor. Each further anchor is assigned the box that it
    overlaps most, if their IoU is at least the threshold. Offsets of a box with centre (x, y), width w and height h:

    .. math:: 10 \frac{x - x_a}{w_a}, \quad 10 \frac{y - y_a}{h_a}, \quad
        5 \log \left(\frac{w}{w_a} + 10^{-6}\right), \quad 5 \log \left(\frac{h}{h_a} + 10^{-6}\right)

    Args:
        anchors: (1, A, 4) or (A, 4), x1, y1, x2, y2.
        labels: (B, G, 5), class and box of each object. Class -1 is padding, for images with fewer objects.
        iou_threshold: for anchors that are no box's best.

    Returns:
        (offsets, mask, classes): offsets (B, 4 * A), 0 where no box is assigned; mask (B, 4 * A), 1 or 0, whether one
        is; classes (B, A) int64, 0 for none and 1 + the box's class.

    Raises:
        RuntimeError: for a wrong shape.

    Example:
        >>> anchors = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
        >>> labels = torch.tensor([[[2, 0.5, 0.5, 1, 1.0]]])
        >>> multibox_target(anchors, labels)[2]
        tensor([[0, 3]])
    """
    anchors = _anchors(anchors, "multibox_target")
    if labels.dim() != 3 or labels.shape[2] != 5:
        raise RuntimeError(f"multibox_target: labels must have shape (B, G, 5), got {tuple(labels.shape)}")
    classes, boxes = labels[..., 0], labels[..., 1:]
    number, objects = anchors.shape[0], labels.shape[1]
    if objects == 0:  # as if there were padding
        classes, boxes = classes.new_full((labels.shape[0], 1), -1), boxes.new_zeros(labels.shape[0], 1, 4)
    iou = box_iou(anchors, boxes).nan_to_num(0).masked_fill((classes < 0)[:, None], -1)  # [B, A, G]
    most, assigned = iou.max(2)
    assigned = torch.where(most >= iou_threshold, assigned, -1)
    anchor, box = (torch.arange(n, device=iou.device) for n in iou.shape[1:])
    for _ in range(objects):
        best, place = iou.flatten(1).max(1)
        chosen = ((anchor == (place // objects)[:, None]), (box == (place % objects)[:, None]))
        assigned = torch.where(chosen[0] & (best >= 0)[:, None], (place % objects)[:, None], assigned)
        iou = iou.masked_fill(chosen[0][:, :, None] | chosen[1][:, None, :], -1)
    has_box = assigned >= 0
    picked = assigned.clamp(min=0)
    center, size = box_convert(anchors, "xyxy", "cxcywh").split(2, -1)
    boxes = boxes.gather(1, picked[..., None].expand(-1, -1, 4))
    box_center, box_size = box_convert(boxes, "xyxy", "cxcywh").split(2, -1)
    offsets = torch.cat(
        (CENTER_SCALE * (box_center - center) / size, SIZE_SCALE * torch.log(1e-6 + box_size / size)), -1
    )
    offsets = torch.where(has_box[..., None], offsets, 0)
    mask = has_box[..., None].expand(-1, -1, 4).to(offsets.dtype)
    target = torch.where(has_box, classes.gather(1, picked).long() + 1, 0)
    return offsets.reshape(-1, 4 * number), mask.reshape(-1, 4 * number), target


def multibox_detection(
    cls_probs: Tensor,
    offset_preds: Tensor,
    anchors: Tensor,
    nms_threshold: float = 0.5,
    pos_threshold: float = 0.009999999,
) -> Tensor:
    r"""The boxes that a detector's predictions stand for, each once.

    An anchor's class is the most probable one but for the background, its probability the confidence. Of boxes of an
    image that overlap, whatever their classes, :func:`nms` keeps the most confident; the others are background.

    Args:
        cls_probs: (B, 1 + C, A), probabilities of background and C classes.
        offset_preds: (B, 4 * A), as :func:`multibox_target`'s offsets.
        anchors: (1, A, 4) or (A, 4), x1, y1, x2, y2.
        nms_threshold: the IoU above which boxes overlap.
        pos_threshold: boxes with less confidence are background.

    Returns:
        Tensor: (B, A, 6), class (from 0; -1 for background), confidence and box of each anchor: those that were kept by
        decreasing confidence, then the others. Of a box below pos_threshold the confidence is that of background.

    Raises:
        RuntimeError: for a wrong shape.

    Example:
        >>> anchors = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.6]])
        >>> probabilities = torch.tensor([[[0.1, 0.2], [0.9, 0.8]]])
        >>> multibox_detection(probabilities, torch.zeros(1, 8), anchors)[0, :, :2]
        tensor([[ 0.0000,  0.9000],
                [-1.0000,  0.8000]])
    """
    anchors = _anchors(anchors, "multibox_detection")
    number = anchors.shape[0]
    if cls_probs.dim() != 3 or cls_probs.shape[1] < 2 or cls_probs.shape[2] != number:
        raise RuntimeError(
            f"multibox_detection: cls_probs must have shape (B, 1 + C, {number}), got {tuple(cls_probs.shape)}"
        )
    if offset_preds.shape != (cls_probs.shape[0], 4 * number):
        raise RuntimeError(
            f"multibox_detection: offset_preds must have shape ({cls_probs.shape[0]}, {4 * number}), got "
            f"{tuple(offset_preds.shape)}"
        )
    confidence, classes = cls_probs[:, 1:].max(1)
    center, size = box_convert(anchors, "xyxy", "cxcywh").split(2, -1)
    moved, scaled = offset_preds.reshape(-1, number, 4).split(2, -1)
    boxes = torch.cat((moved * size / CENTER_SCALE + center, torch.exp(scaled / SIZE_SCALE) * size), -1)
    dtype = torch.promote_types(boxes.dtype, confidence.dtype)
    boxes, confidence = box_convert(boxes, "cxcywh", "xyxy").to(dtype), confidence.to(dtype)

    kept, _ = nms_padded(boxes, confidence, nms_threshold)
    place = torch.arange(number, device=boxes.device).expand_as(kept)
    # Where a box goes: kept ones in their order, others behind them in theirs.  The last column is for what is no box.
    rank = torch.cat((place + number, place[:, :1]), 1).scatter(1, torch.where(kept < 0, number, kept), place)[:, :-1]
    order = rank.argsort(1)
    classes = torch.where(rank < number, classes, -1).gather(1, order)
    confidence, boxes = confidence.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    background = confidence < pos_threshold
    classes = classes.masked_fill(background, -1)
    confidence = torch.where(background, 1 - confidence, confidence)
    return torch.cat((classes[..., None].to(dtype), confidence[..., None], boxes), -1)


def _anchors(anchors: Tensor, op: str) -> Tensor:
    if anchors.dim() == 3 and anchors.shape[0] == 1:
        anchors = anchors[0]
    if anchors.dim() != 2 or anchors.shape[1] != 4:
        raise RuntimeError(f"{op}: anchors must have shape (1, A, 4) or (A, 4), got {tuple(anchors.shape)}")
    return anchors
