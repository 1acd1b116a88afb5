"""soft_nms against plain loops in float64, on every backend."""

import math

import pytest
import torch
from conftest import DTYPES
from test_nms import random_boxes, run

from fastnorm.ops import soft_nms

EVERY_ISA = True


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return both / (area[0] + area[1] - both) if both > 0 else 0.0


def reference(boxes, scores, method, threshold, sigma, drop, idxs=None):
    boxes, left = boxes.double().tolist(), dict(enumerate(scores.double().tolist()))
    keep, updated = [], []
    while left := {i: s for i, s in left.items() if s > drop}:
        best = max(left, key=lambda i: (left[i], -i))
        keep.append(best)
        updated.append(left.pop(best))
        for i in left:
            iou = overlap(boxes[best], boxes[i]) if idxs is None or idxs[i] == idxs[best] else 0.0
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                left[i] *= 1 - iou
    return keep, updated


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("n", [1, 16, 33, 400])
def test_sizes(backend, n, method):
    boxes, scores = random_boxes(n, torch.float64)
    keep, updated = run(backend, soft_nms, boxes, scores, 0.3, method=method)
    expected, values = reference(boxes, scores, method, 0.3, 0.5, 0.001)
    assert keep.dtype == torch.int64 and keep.tolist() == expected
    torch.testing.assert_close(updated, torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype, method):
    boxes, _ = random_boxes(60, dtype)
    scores = (torch.randperm(60) / 60).to(dtype)
    keep, updated = run(backend, soft_nms, boxes, scores, 0.4, method=method, sigma=0.3, score_threshold=0.1)
    expected, values = reference(boxes, scores, method, 0.4, 0.3, 0.1)
    assert updated.dtype == dtype and keep.tolist() == expected
    torch.testing.assert_close(updated, torch.tensor(values, dtype=torch.float64).to(dtype))


def test_classes_thresholds_and_most(backend):
    boxes, scores = random_boxes(90, torch.float64, extent=40)
    for dtype in (torch.int32, torch.float32):
        idxs = torch.randint(3, (90,)).to(dtype)
        expected, values = reference(boxes, scores, "gaussian", 0, 0.5, 0.3, idxs.tolist())
        assert 10 < len(expected) < 90
        for most in (None, 0, 7, 500):
            options = {"idxs": idxs, "score_threshold": 0.3, "max_output": most}
            keep, updated = run(backend, soft_nms, boxes, scores, **options)
            assert keep.tolist() == expected[:most]
            torch.testing.assert_close(updated, torch.tensor(values[:most], dtype=torch.float64))


def test_hard_values(backend):
    """Ties in their order, NaN scores never, boxes without area or with NaN leave others alone."""
    box = [0.0, 0, 9, 9]
    boxes = torch.tensor([box, [5, 5, 5, 5], [5, 5, 5, 5], [math.nan, 0, 9, 9], box, [math.inf, 0, math.inf, 9], box])
    scores = torch.tensor([0.5, 0.5, 0.5, 0.9, math.nan, 0.8, 1.0])
    keep, updated = run(backend, soft_nms, boxes.double(), scores.double(), method="linear")
    assert keep.tolist() == [6, 3, 5, 1, 2]  # box 0 has an IoU of 1 with box 6
    assert updated.tolist() == scores.double()[keep].tolist()
    keep, updated = run(backend, soft_nms, torch.empty(0, 4), torch.empty(0))
    assert keep.shape == updated.shape == (0,)


def test_wrong_arguments(backend):
    boxes, scores = random_boxes(3)
    with pytest.raises(ValueError, match="soft_nms: method must be one of linear, gaussian, got hard"):
        run(backend, soft_nms, boxes, scores, method="hard")
    with pytest.raises(ValueError, match="soft_nms: sigma must be positive, got 0"):
        run(backend, soft_nms, boxes, scores, sigma=0.0)
    with pytest.raises(RuntimeError, match="soft_nms: scores should be a 1d tensor, got 2D"):
        run(backend, soft_nms, boxes, scores[None])
