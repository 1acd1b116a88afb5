"""The utilities against numbers worked out one at a time; their dtypes, gradients and compilation."""

import doctest

import pytest
import torch
from conftest import DTYPES

import fastnorm
from fastnorm.ops import (
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou,
    remove_small_boxes,
)

FORMATS = ("xyxy", "xywh", "cxcywh")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def whole_boxes(*shape, dtype=torch.float64):
    """Of even whole numbers, so that centres are whole too and every dtype holds all results exactly."""
    corner, size = (torch.randint(low, high, (*shape, 2)) * 2 for low, high in ((0, 20), (1, 10)))
    return torch.cat([corner, corner + size], -1).to(dtype)


def converted(box, fmt):
    x1, y1, x2, y2 = box
    if fmt == "xyxy":
        return [x1, y1, x2, y2]
    x, y = (x1, y1) if fmt == "xywh" else ((x1 + x2) / 2, (y1 + y2) / 2)
    return [x, y, x2 - x1, y2 - y1]


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def pair(a, b):
    """IoU and generalized IoU."""
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area(a) + area(b) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


def promoted(dtype):
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize == 2 else dtype
    return dtype if dtype.itemsize >= 4 else torch.int32


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_area_and_iou(fmt, dtype):
    exact = whole_boxes(7), whole_boxes(5)
    one, two = (torch.tensor([converted(b, fmt) for b in t.tolist()]).to(dtype) for t in exact)
    areas = box_area(one, fmt)
    assert areas.dtype == promoted(dtype) and areas.tolist() == [area(b) for b in exact[0].tolist()]
    iou = box_iou(one, two, fmt)
    assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([[pair(a, b)[0] for b in exact[1].tolist()] for a in exact[0].tolist()])
    torch.testing.assert_close(iou, expected.to(iou.dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=str)
def test_generalized_iou(dtype):
    one, two = whole_boxes(7), whole_boxes(5)
    result = generalized_box_iou(one.to(dtype), two.to(dtype))
    expected = torch.tensor([[pair(a, b)[1] for b in two.tolist()] for a in one.tolist()])
    torch.testing.assert_close(result, expected.to(result.dtype))


def test_leading_dimensions():
    one, two = whole_boxes(2, 1, 7), whole_boxes(3, 5)
    for function in (box_iou, generalized_box_iou):
        result = function(one, two)
        assert result.shape == (2, 3, 7, 5)
        for i in range(2):
            for j in range(3):
                assert torch.equal(result[i, j], function(one[i, 0], two[j]))
    assert box_area(one).shape == (2, 1, 7)
    assert box_iou(torch.empty(0, 4), two[0]).shape == (0, 5)


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=str)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_convert(fmt, to, dtype):
    exact = whole_boxes(6).tolist()
    boxes = torch.tensor([converted(b, fmt) for b in exact]).to(dtype)
    result = box_convert(boxes, fmt, to)
    assert result.tolist() == [converted(b, to) for b in exact]
    centers = fmt != to and "cxcywh" in (fmt, to)
    assert result.dtype == (torch.float32 if centers and not dtype.is_floating_point else dtype)
    assert result.data_ptr() != boxes.data_ptr()


def test_float16_areas_do_not_overflow():
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 300, 150]], dtype=torch.float16)
    assert box_area(boxes).tolist() == [90000, 45000]
    assert box_iou(boxes, boxes)[0].tolist() == [1, 0.5]
    assert box_area(torch.tensor([[0, 0, 200, 200]], dtype=torch.uint8)).item() == 40000


def test_degenerate_boxes():
    point = torch.tensor([[1.0, 1, 1, 1]])
    assert box_iou(point, point).isnan().all()
    assert box_iou(point, torch.tensor([[0.0, 0, 2, 2]])).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_clip_and_remove(dtype):
    boxes = torch.tensor([[-5, -1, 3, 200], [2, 3, 300, 4], [150, 7, 160, 9]], dtype=dtype)
    clipped = clip_boxes_to_image(boxes, (50, 100))
    assert clipped.dtype == dtype
    assert clipped.tolist() == [[0, 0, 3, 50], [2, 3, 100, 4], [100, 7, 100, 9]]
    assert clip_boxes_to_image(boxes[None, :, None], (50, 100)).tolist() == clipped[None, :, None].tolist()
    assert remove_small_boxes(clipped, 3).tolist() == [0]
    assert remove_small_boxes(clipped, 1).tolist() == [0, 1]
    assert remove_small_boxes(clipped, 0).tolist() == [0, 1, 2]


def test_gradients():
    one, two = (whole_boxes(n).requires_grad_() for n in (4, 3))
    with torch.no_grad():
        one += torch.rand_like(one) * 0.5  # away from kinks
    for function in (box_iou, generalized_box_iou):
        torch.autograd.gradcheck(function, (one, two))
        torch.autograd.gradgradcheck(function, (one, two))
    for function in (box_area, lambda b: box_convert(b, "xywh", "cxcywh"), lambda b: clip_boxes_to_image(b, (21, 21))):
        torch.autograd.gradcheck(function, (one,))


@pytest.mark.filterwarnings("error")  # of operators that vmap can only loop over
def test_vmap():
    one, two = whole_boxes(2, 4), whole_boxes(3)
    for function in (box_iou, generalized_box_iou):
        assert torch.equal(torch.vmap(lambda b, f=function: f(b, two))(one), function(one, two))
        assert torch.equal(torch.vmap(lambda b, f=function: f(two, b))(one), function(two, one))


def test_compiled_in_one_graph():
    def everything(a, b):
        convert = box_convert(a, "cxcywh", "xyxy")
        clipped = clip_boxes_to_image(b, (20, 30))
        return box_area(a), box_iou(a, b), generalized_box_iou(a, b), convert, clipped, remove_small_boxes(b, 5)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8):
        arguments = whole_boxes(n), whole_boxes(n + 1)
        torch.testing.assert_close(compiled(*arguments), everything(*arguments))


def test_unknown_formats():
    boxes = whole_boxes(2)
    with pytest.raises(ValueError, match="box_area: the format must be one of xyxy, xywh, cxcywh, got yxyx"):
        box_area(boxes, "yxyx")
    with pytest.raises(ValueError, match="box_iou: the format must be"):
        box_iou(boxes, boxes, "xy")
    for formats in (("xyxy", "xyz"), ("xyz", "xyxy"), ("xyz", "xyz")):
        with pytest.raises(ValueError, match="box_convert: the format must be one of xyxy, xywh, cxcywh, got xyz"):
            box_convert(boxes, *formats)


@pytest.mark.parametrize("name", fastnorm.ops.__all__)
def test_docstring_examples(name):
    function = getattr(fastnorm.ops, name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = finder.find(function, name, globs={"torch": torch, name: function})
    assert examples[0].examples
    runner.run(examples[0])
    assert runner.failures == 0
