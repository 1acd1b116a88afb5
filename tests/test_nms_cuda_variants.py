"""NMS's CUDA kernels in every order of threads and blocks, however many threads share the work on a box."""

import math

import pytest
import torch
from cuda_emulator import SCHEDULES, configure, library, unavailable_reason
from test_nms import random_boxes, reference

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

# Of the sizes of a batch of two: several chunks, shared by 1, 2 and 8 threads; small segments beside large ones.
CASES = {"one thread": (2300, 1, None), "two": (2300, 8, None), "eight": (2300, 132, None), "classes": (2300, 132, 7)}


@pytest.mark.parametrize("case", CASES)
def test_every_order(case):
    n, sm_count, classes = CASES[case]
    library()
    images = [random_boxes(n, seed=s, extent=4 * math.sqrt(n)) for s in range(2)]
    boxes, scores = (torch.stack(t) for t in zip(*images, strict=True))
    idxs = None if classes is None else (torch.rand(2, n).square() * classes).long()  # small and large ones
    expected = [reference(*image, 0.4, None if idxs is None else idxs[i].tolist()) for i, image in enumerate(images)]
    try:
        for schedule, blocks_at_once in zip(SCHEDULES, (1, 3, 5), strict=True):
            configure(schedule, 7, blocks_at_once, sm_count)
            indices, count = torch.ops.fastnorm_emu.nms_padded(boxes, scores, idxs, 0.4, None, n)
            for i in range(2):
                assert indices[i].tolist() == expected[i] + [-1] * (n - len(expected[i]))
                assert count[i] == len(expected[i])
    finally:
        configure()


def test_soft_in_every_order():
    library()
    boxes, scores = random_boxes(1500, extent=500)
    arguments = boxes, scores, None, True, 0.3, 0.5, 0.9, None
    expected = torch.ops.fastnorm.soft_nms(*arguments)
    assert len(expected[0]) > 50
    try:
        for schedule in SCHEDULES:
            configure(schedule, 7)
            keep, updated = torch.ops.fastnorm_emu.soft_nms(*arguments)
            assert torch.equal(keep, expected[0])
            torch.testing.assert_close(updated, expected[1])
    finally:
        configure()
