"""Non-maximum suppression: hard and soft, of one image, of classes, of a batch.

Boxes are (x1, y1, x2, y2). None of these functions is differentiable.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ._library import ops

METHODS = ("linear", "gaussian")


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    r"""Goes through the boxes by decreasing score and keeps each that overlaps none that was kept before.

    Two boxes overlap where their intersection over union is greater than the threshold:

    .. math:: \frac{\mathrm{intersection}}{\mathrm{area}_a + \mathrm{area}_b - \mathrm{intersection}}
        > \mathrm{iou\_threshold}

    Boxes with equal scores go in their order, a NaN score first. The IoU of two boxes without area is NaN: both are
    kept. The results are the same on every device and for any number of threads.

    Args:
        boxes: (N, 4), float64, float32, float16 or bfloat16. float16 and bfloat16 are computed with in float32.
        scores: (N,), of the boxes' dtype.
        iou_threshold: boxes that overlap by more are dropped.
        score_threshold: boxes whose score is not greater are dropped first. None: no box is.
        max_output: how many boxes to return at most. None: all.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes by decreasing score.

    Raises:
        RuntimeError: for a wrong shape or device, a dtype of the scores that is not the boxes', a negative max_output.
        NotImplementedError: for another dtype.

    Source: ``torchvision.ops.nms``.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
        >>> nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5)
        tensor([1, 2])
    """
    if has_torch_function((boxes, scores)):
        return handle_torch_function(
            nms, (boxes, scores), boxes, scores, iou_threshold, score_threshold=score_threshold, max_output=max_output
        )
    return ops.nms(*_inputs(boxes, scores), None, iou_threshold, score_threshold, max_output)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    score_threshold: float | None = None,
    max_output: int | None = None,
) -> Tensor:
    """Non-maximum suppression of several classes or images at once: boxes of different ones do not suppress each other.

    They are kept apart by their index itself, so the result is that of :func:`nms` for each alone, merged by score, no
    matter how far from the origin or from each other the boxes are.

    Args:
        boxes: (N, 4), as :func:`nms`'s.
        scores: (N,), of the boxes' dtype.
        idxs: (N,), the class or image of each box, of any integer or floating dtype.
        iou_threshold, score_threshold, max_output: as :func:`nms`'s; max_output counts the boxes of all classes.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes by decreasing score.

    Raises:
        RuntimeError: as :func:`nms`, and for idxs of another shape or device than the scores.

    Source: ``torchvision.ops.batched_nms``.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 10, 10]])
        >>> batched_nms(boxes, torch.tensor([0.8, 0.9, 0.7]), torch.tensor([0, 0, 1]), 0.5)
        tensor([1, 2])
    """
    if has_torch_function((boxes, scores, idxs)):
        return handle_torch_function(
            batched_nms, (boxes, scores, idxs), boxes, scores, idxs, iou_threshold, score_threshold=score_threshold,
            max_output=max_output,
        )  # fmt: skip
    return ops.nms(*_inputs(boxes, scores), _as_int64(idxs), iou_threshold, score_threshold, max_output)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int | None = None,
    *,
    idxs: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression with results of fixed size: of one image or a batch, without waiting for a GPU.

    Nothing depends on the data but what is in the results, so a CUDA graph may hold it.

    Args:
        boxes: (N, 4) or (B, N, 4), as :func:`nms`'s; the images of a batch are independent.
        scores: (N,) or (B, N), of the boxes' dtype.
        iou_threshold: as :func:`nms`'s.
        max_output: M, the size of the result. None: N.
        idxs: (N,) or (B, N), as :func:`batched_nms`'s. None: all boxes of an image are of one class.
        score_threshold: as :func:`nms`'s.

    Returns:
        (indices, count): indices (M,) or (B, M) int64, of the kept boxes by decreasing score, filled up with -1; count
        () or (B,) int64, how many there are.

    Raises:
        RuntimeError: as :func:`nms`.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
        >>> nms_padded(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5)
        (tensor([ 1,  2, -1]), tensor(2))
    """
    if has_torch_function((boxes, scores, idxs)):
        return handle_torch_function(
            nms_padded, (boxes, scores, idxs), boxes, scores, iou_threshold, max_output, idxs=idxs,
            score_threshold=score_threshold,
        )  # fmt: skip
    (boxes, scores), segments = _inputs(boxes, scores), None if idxs is None else _as_int64(idxs)
    one_image = boxes.dim() == 2
    if one_image:
        boxes, scores, segments = boxes[None], scores[None], None if segments is None else segments[None]
    size = boxes.shape[-2] if max_output is None else max_output
    indices, count = ops.nms_padded(boxes, scores, segments, iou_threshold, score_threshold, size)
    return (indices[0], count[0]) if one_image else (indices, count)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    idxs: Tensor | None = None,
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Soft non-maximum suppression: boxes that overlap one with a higher score lose score instead of being dropped.

    The box with the highest score is selected, then the scores of all others are multiplied by

    .. math:: \begin{cases} 1 - \mathrm{IoU} & \text{where } \mathrm{IoU} \ge \mathrm{iou\_threshold}, \text{ else } 1
        & \text{(linear)} \\ \exp(-\mathrm{IoU}^2 / \sigma) & \text{(gaussian)} \end{cases}

    and so on, until no score is greater than the score threshold. Of equal scores the first is selected.

    Args:
        boxes: (N, 4), as :func:`nms`'s.
        scores: (N,), of the boxes' dtype. A NaN is never selected.
        iou_threshold: of the linear method.
        method: "linear" or "gaussian".
        sigma: of the gaussian method, positive.
        score_threshold: boxes are dropped once their score is not greater than this.
        idxs: (N,), as :func:`batched_nms`'s: boxes of different classes leave each other's scores alone.
        max_output: how many boxes to select at most. None: all.

    Returns:
        (keep, updated): keep (K,) int64, the selected boxes in their order, by decreasing updated score; updated (K,),
        the scores that they were selected with, of the scores' dtype.

    Raises:
        ValueError: for an unknown method or a sigma that is not positive.
        RuntimeError: as :func:`nms`.

    Source: Bodla, Singh, Chellappa and Davis 2017, https://arxiv.org/abs/1704.04503.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]])
        >>> soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), method="linear")
        (tensor([0, 2, 1]), tensor([0.9000, 0.7000, 0.4000]))
    """
    if has_torch_function((boxes, scores, idxs)):
        return handle_torch_function(
            soft_nms, (boxes, scores, idxs), boxes, scores, iou_threshold, method=method, sigma=sigma,
            score_threshold=score_threshold, idxs=idxs, max_output=max_output,
        )  # fmt: skip
    if method not in METHODS:
        raise ValueError(f"soft_nms: method must be one of {', '.join(METHODS)}, got {method}")
    segments = None if idxs is None else _as_int64(idxs)
    gaussian = method == "gaussian"
    return ops.soft_nms(*_inputs(boxes, scores), segments, gaussian, iou_threshold, sigma, score_threshold, max_output)


def _inputs(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Without gradients; under autocast 16-bit ones in float32, as torchvision's are."""
    boxes, scores = boxes.detach(), scores.detach()
    device = boxes.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        boxes, scores = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (boxes, scores))
    return boxes, scores


def _as_int64(idxs: Tensor) -> Tensor:
    """Different numbers for different classes."""
    if idxs.is_floating_point():
        return (idxs.double() + 0.0).view(torch.int64)  # -0 and 0 are one class
    return idxs.to(torch.int64)


@torch.library.register_fake("fastnorm::nms")
def _fake_nms(boxes, scores, segments, iou_threshold, score_threshold, max_output):
    return boxes.new_empty(_new_size(boxes, max_output), dtype=torch.int64)


@torch.library.register_fake("fastnorm::soft_nms")
def _fake_soft_nms(boxes, scores, segments, gaussian, iou_threshold, sigma, score_threshold, max_output):
    size = _new_size(boxes, max_output)
    return boxes.new_empty(size, dtype=torch.int64), boxes.new_empty(size)


def _new_size(boxes: Tensor, max_output: int | None) -> int:
    size = torch.library.get_ctx().new_dynamic_size()
    torch._check(size <= boxes.shape[0])
    if max_output is not None:
        torch._check(size <= max_output)
    return size
