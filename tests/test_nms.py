"""nms, batched_nms and nms_padded against plain loops, on every backend.

Sizes are chosen by what the kernels do: the CPU's take a vector of up to 16 boxes at a time and treat segments of no
more than that apart; the GPU's decide on 64 boxes at once and go through a segment in chunks of 1024.
"""

import math

import pytest
import torch
from conftest import DTYPES

from fastnorm.ops import batched_nms, nms, nms_padded

EVERY_ISA = True

SIZES = (1, 2, 15, 16, 17, 33, 63, 64, 65, 130, 1023, 1024, 1025, 2200)


def order_of(scores):
    """By decreasing score, NaN first, ties in their order."""
    values = scores.double().tolist()
    return sorted(range(len(values)), key=lambda i: (0, 0) if math.isnan(values[i]) else (1, -values[i]))


def reference(boxes, scores, threshold, idxs=None):
    """All pairs, one rounded operation at a time; then box by box."""
    boxes = boxes.double() if boxes.dtype == torch.float64 else boxes.float()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    width, height = (high - low).clamp(min=0).unbind(2)
    both = width * height
    over = (both / (areas[:, None] + areas - both)).double() > threshold
    if idxs is not None:
        idxs = torch.tensor(idxs)
        over &= idxs[:, None] == idxs
    over, gone, keep = over.numpy(), torch.zeros(len(boxes), dtype=torch.bool).numpy(), []
    for i in order_of(scores):
        if not gone[i]:
            keep.append(i)
            gone |= over[i]
    return keep


def random_boxes(n, dtype=torch.float32, extent=None, seed=0):
    """About as many are kept as dropped at a threshold of 0.4."""
    generator = torch.Generator().manual_seed(seed)
    extent = extent or 6 * math.sqrt(n)
    corner = torch.rand(n, 2, generator=generator) * extent
    size = torch.rand(n, 2, generator=generator) * 20 + 5
    scores = torch.rand(n, generator=generator)
    return torch.cat([corner, corner + size], 1).to(dtype), scores.to(dtype)


def run(backend, function, *tensors_and_numbers, **options):
    move = lambda a: a.to(backend.device) if isinstance(a, torch.Tensor) else a  # noqa: E731
    result = function(*map(move, tensors_and_numbers), **{k: move(v) for k, v in options.items()})
    return [t.cpu() for t in result] if isinstance(result, tuple) else result.cpu()


def check(backend, boxes, scores, threshold, **options):
    keep = run(backend, nms, boxes, scores, threshold, **options)
    assert keep.dtype == torch.int64
    expected = reference(boxes, scores, threshold)
    assert keep.tolist() == expected
    return expected


@pytest.mark.parametrize("n", SIZES)
def test_sizes(backend, n):
    kept = check(backend, *random_boxes(n), 0.4)
    assert n < 15 or n // 8 < len(kept) < n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_dtypes(backend, dtype, threshold):
    check(backend, *random_boxes(150, dtype), threshold)


@pytest.mark.parametrize("spread", ["dense", "alike", "apart"])
def test_chains(backend, spread):
    """One box suppresses many, or the next one only, through several words and chunks; or nothing overlaps."""
    n = 1300
    if spread == "dense":
        boxes, scores = random_boxes(n, extent=30)
    else:
        x = torch.arange(n) * (2.0 if spread == "alike" else 30.0)
        boxes, scores = torch.stack([x, x * 0, x + 10, x * 0 + 10], 1), 1 - torch.arange(n) / n
    kept = check(backend, boxes, scores, 0.5)
    # Boxes that are 2 apart of a length of 10 have an IoU of 2 / 3: every other one goes.
    assert len(kept) == {"dense": len(kept), "alike": n // 2, "apart": n}[spread]


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("scene", ["sizes", "outlier", "line", "grid", "moved", "far", "infinite"])
def test_where_boxes_are(backend, scene, threshold):
    """The CPU looks for overlaps by cells about the size of a box: here boxes are of all sizes or not spread evenly."""
    n = 400
    boxes, scores = random_boxes(n, extent=120)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    if scene == "sizes":  # the largest touch all cells
        size = size * 10 ** (2 * torch.rand(n, 1) - 1)
    elif scene == "outlier":
        center[7] = torch.tensor([1e7, -1e9])
    elif scene == "line":
        center[:, 1], size[:, 1] = 3.0, 2.0
    elif scene == "grid":  # edges on edges, and shifts by whole fractions of a box
        center, size = (center / 5).round() * 5, torch.full_like(size, 20)
    elif scene == "moved":  # coordinates of few significant bits
        center = center + 2**20
    boxes = torch.cat([center - size / 2, center + size / 2], 1)
    if scene == "far":
        boxes[::2] *= 1e37
    elif scene == "infinite":
        boxes[::5, 2] = math.inf
        boxes[1::5, 1] = -math.inf
        boxes[2::5, 0] = math.nan
    check(backend, boxes, scores, threshold)


def test_the_threshold_itself_is_kept(backend):
    """The IoU is a float32, but the threshold is compared with as the double that it is."""
    for share in (0.1, 0.3, 0.5, 0.7):
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, share]])
        area = boxes[1, 3]
        iou = (area / (1 + area - area)).item()
        for threshold, expected in ((iou, [0, 1]), (iou - 1e-12, [0]), (iou + 1e-12, [0, 1])):
            assert run(backend, nms, boxes, torch.tensor([1.0, 0.5]), threshold).tolist() == expected


def test_ties_keep_their_order(backend):
    boxes, _ = random_boxes(300)
    scores = torch.randint(3, (300,)) / 2.0
    scores[::7] = -0.0  # is 0
    check(backend, boxes, scores, 0.4)
    check(backend, boxes, torch.zeros(300), 0.4)


def test_hard_scores(backend):
    boxes, scores = random_boxes(200)
    scores[::9], scores[1::9], scores[2::9], scores[3::9] = math.nan, math.inf, -math.inf, -scores[3::9]
    check(backend, boxes, scores, 0.4)


def test_degenerate_boxes(backend):
    point, line = [5.0, 5, 5, 5], [0.0, 3, 9, 3]
    turned, inside_out = [9.0, 0, 0, 9], [9.0, 9, 0, 0]
    empty = [0.0, 0, 0, 0]
    hard = [[math.nan, 0, 9, 9], [0, 0, math.nan, 9], [0, 0, math.inf, 9], [-math.inf, -math.inf, math.inf, math.inf]]
    huge = [[0, 0, 3e38, 3e38], [-3e38, 0, 3e38, 9], [1e-30, 0, 2e-30, 1e-30], [1e-30, 0, 2e-30, 1e-30]]
    boxes = torch.tensor([[0, 0, 9, 9.0], *2 * [point, line, turned, inside_out, empty, *hard, *huge], [0, 0, 9, 8]])
    for seed in range(3):
        scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(seed))
        for threshold in (0.5, 0.0, -0.5, math.inf, -math.inf, math.nan):
            check(backend, boxes, scores, threshold)
    assert run(backend, nms, torch.zeros(5, 4), torch.ones(5), 0.0).tolist() == [0, 1, 2, 3, 4]


def test_float16_does_not_overflow(backend):
    """An area of 300 * 300 is infinite in float16."""
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 300, 290], [0, 0, 300, 100]], dtype=torch.float16)
    scores = torch.tensor([1, 0.5, 0.2], dtype=torch.float16)
    assert run(backend, nms, boxes, scores, 0.5).tolist() == [0, 2]


@pytest.mark.parametrize("classes", [1, 4, 40, 600])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16, torch.float32], ids=str)
def test_classes(backend, classes, dtype):
    boxes, scores = random_boxes(600, extent=60)
    idxs = torch.randint(classes, (600,)) - (classes // 2 if dtype.is_signed else 0)
    idxs = idxs.to(dtype)
    keep = run(backend, batched_nms, boxes, scores, idxs, 0.4)
    assert keep.tolist() == reference(boxes, scores, 0.4, idxs.tolist())


def test_large_classes(backend):
    """One class of several chunks, one that ends with a chunk, and small ones."""
    boxes, scores = random_boxes(3700, extent=200)
    idxs = torch.cat([torch.full((2100,), 5), torch.full((1024,), -3), torch.arange(576) // 9 + 100])
    idxs = idxs[torch.randperm(len(idxs))]
    keep = run(backend, batched_nms, boxes, scores, idxs, 0.4)
    assert keep.tolist() == reference(boxes, scores, 0.4, idxs.tolist())


def test_classes_are_no_coordinate_offset(backend):
    """Far from the origin, and classes far from each other, where adding an offset would round boxes together."""
    boxes, scores = random_boxes(100, extent=50)
    boxes = boxes * 2**-10
    idxs = torch.tensor([0, 2**40, -(2**62), 2**62])[torch.randint(4, (100,))]
    keep = run(backend, batched_nms, boxes, scores, idxs, 0.4)
    assert keep.tolist() == reference(boxes, scores, 0.4, idxs.tolist())


def test_score_threshold_and_max_output(backend):
    boxes, scores = random_boxes(1500, extent=100)
    scores[::11] = math.nan
    idxs = torch.randint(3, (1500,))
    limit = 0.3
    chosen = (scores > limit).nonzero()[:, 0]
    for function, arguments in ((nms, ()), (batched_nms, (idxs,))):
        labels = idxs[chosen].tolist() if arguments else None
        expected = chosen[reference(boxes[chosen], scores[chosen], 0.4, labels)].tolist()
        everything = reference(boxes, scores, 0.4, idxs.tolist() if arguments else None)
        call = lambda f=function, a=arguments, **o: run(backend, f, boxes, scores, *a, 0.4, **o).tolist()  # noqa: E731
        assert call(score_threshold=limit) == expected
        for most in (0, 1, 70, 2000):
            assert call(score_threshold=limit, max_output=most) == expected[:most]
            assert call(max_output=most) == everything[:most]
        assert call(score_threshold=math.inf) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_score_threshold_is_of_the_scores_dtype(backend, dtype):
    """As `scores > threshold` is, which rounds 0.3."""
    scores = torch.tensor([0.3, 0.31], dtype=dtype)
    boxes = torch.tensor([[0, 0, 1, 1], [5, 5, 6, 6]], dtype=dtype)
    assert run(backend, nms, boxes, scores, 0.5, score_threshold=0.3).tolist() == [1]


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("n", [1, 40, 70, 1100])
def test_batches(backend, n, classes):
    images = [random_boxes(n, seed=s, extent=5 * math.sqrt(n)) for s in range(3)]
    boxes, scores = (torch.stack(t) for t in zip(*images, strict=True))
    idxs = None if classes is None else torch.randint(classes, (3, n))
    for most in (None, 3, n + 5):
        options = {"idxs": idxs, "score_threshold": 0.2}
        indices, count = run(backend, nms_padded, boxes, scores, 0.4, most, **options)
        assert indices.shape == (3, n if most is None else most) and count.shape == (3,)
        assert indices.dtype == count.dtype == torch.int64
        for i in range(3):
            chosen = (scores[i] > 0.2).nonzero()[:, 0]
            labels = None if idxs is None else idxs[i][chosen].tolist()
            expected = chosen[reference(boxes[i][chosen], scores[i][chosen], 0.4, labels)].tolist()[: indices.shape[1]]
            assert count[i] == len(expected)
            assert indices[i].tolist() == expected + [-1] * (indices.shape[1] - len(expected))
            options = {"idxs": None if idxs is None else idxs[i], "score_threshold": 0.2}
            alone, number = run(backend, nms_padded, boxes[i], scores[i], 0.4, most, **options)
            assert number.shape == () and number == count[i] and torch.equal(alone, indices[i])


def test_no_boxes(backend):
    boxes, scores = torch.empty(0, 4), torch.empty(0)
    for function, arguments in ((nms, ()), (batched_nms, (torch.empty(0, dtype=torch.int32),))):
        keep = run(backend, function, boxes, scores, *arguments, 0.5)
        assert keep.shape == (0,) and keep.dtype == torch.int64
    indices, count = run(backend, nms_padded, boxes[None].expand(2, 0, 4), scores[None].expand(2, 0), 0.5, 3)
    assert indices.tolist() == [[-1] * 3] * 2 and count.tolist() == [0, 0]
    indices, count = run(backend, nms_padded, torch.empty(0, 7, 4), torch.empty(0, 7), 0.5, 3)
    assert indices.shape == (0, 3) and count.shape == (0,)


def test_strides_and_alignment(backend):
    boxes, scores = random_boxes(200)
    expected = reference(boxes, scores, 0.4)
    wide = torch.zeros(200, 9)
    wide[:, 1:9:2] = boxes
    columns = boxes.t().contiguous().t()
    shifted = torch.zeros(801)[1:].view(200, 4)
    shifted.copy_(boxes)
    for view in (wide[:, 1:9:2], columns, shifted):
        assert run(backend, nms, view, torch.stack([scores, scores], 1)[:, 1], 0.4).tolist() == expected
    everywhere = boxes[:1].expand(200, 4), scores[:1].expand(200)
    assert run(backend, nms, *everywhere, 0.5).tolist() == [0]


def test_inputs_that_need_gradients(backend):
    boxes, scores = random_boxes(20)
    expected = reference(boxes, scores, 0.4)
    keep = run(backend, nms, boxes.requires_grad_(), scores.requires_grad_(), 0.4)
    assert keep.tolist() == expected and not keep.requires_grad


def test_autocast(backend):
    """A model under autocast gives boxes in 16 bits beside scores in 32."""
    boxes, scores = random_boxes(60, torch.bfloat16)
    scores = torch.randperm(60) / 60.0
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        keep = run(backend, nms, boxes, scores, 0.4)
    assert keep.tolist() == reference(boxes, scores, 0.4)


def test_torchvision_agrees(backend):
    try:
        import torchvision
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        pytest.skip("torchvision is not installed")
    boxes, scores = random_boxes(900, extent=100)
    idxs = torch.randint(3, (900,))
    for threshold in (0.0, 0.3, 0.6):
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(run(backend, nms, boxes, scores, threshold), expected)
        expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, threshold)
        assert torch.equal(run(backend, batched_nms, boxes, scores, idxs, threshold), expected)


def test_threads_do_not_change_the_result(threads):
    boxes, scores = random_boxes(20_000, extent=400)
    idxs = torch.randint(30, (20_000,)).clamp(max=20)
    batch = boxes.view(4, 5000, 4), scores.view(4, 5000)
    results = []
    for number in (1, 2, 5):
        threads(number)
        results.append((batched_nms(boxes, scores, idxs, 0.5), *nms_padded(*batch, 0.5)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_boxes(backend):
    """Beyond 370,000 boxes, whose pairs are more than int32 counts in words of 64 bits; memory stays linear."""
    if backend.small:
        pytest.skip("takes minutes when every thread of a GPU is emulated")
    n, copies = 100_000, 4
    x, y = torch.arange(n) % 1000 * 10.0, torch.arange(n) // 1000 * 10.0
    boxes = torch.stack([x, y, x + 8, y + 8], 1).repeat(copies, 1)
    scores = 1 - torch.arange(n * copies) / (n * copies)
    scores = scores[torch.randperm(n * copies)]
    keep = run(backend, nms, boxes, scores, 0.5)
    best = scores.view(copies, n).argmax(0) * n + torch.arange(n)
    assert torch.equal(keep, best[scores[best].sort(descending=True, stable=True)[1]])


@pytest.mark.parametrize(
    "boxes, scores, message",
    [
        ((4,), (4,), r"boxes should be a 2d tensor, got 1D"),
        ((3, 5), (3,), r"boxes should have 4 elements in dimension 1, got 5"),
        ((3, 4), (3, 2), r"scores should be a 1d tensor, got 2D"),
        ((3, 4), (4,), r"same number of elements in dimension 0, got 3 and 4"),
    ],
)
def test_wrong_shapes(backend, boxes, scores, message):
    boxes, scores = torch.rand(boxes), torch.rand(scores)
    with pytest.raises(RuntimeError, match=message):
        run(backend, nms, boxes, scores, 0.5)
    with pytest.raises(RuntimeError, match=message):
        run(backend, batched_nms, boxes, scores, torch.zeros(len(scores)), 0.5)


def test_wrong_arguments(backend):
    boxes, scores = random_boxes(5)
    with pytest.raises(RuntimeError, match="same type as scores, got float32 and float64"):
        run(backend, nms, boxes, scores.double(), 0.5)
    with pytest.raises(NotImplementedError, match=r"nms: boxes must be float64, .* got int64"):
        run(backend, nms, boxes.long(), scores.long(), 0.5)
    with pytest.raises(RuntimeError, match=r"idxs must have the scores' shape \(5,\), got \(4,\)"):
        run(backend, batched_nms, boxes, scores, torch.zeros(4), 0.5)
    with pytest.raises(RuntimeError, match="nms: max_output must not be negative, got -1"):
        run(backend, nms, boxes, scores, 0.5, max_output=-1)
    with pytest.raises(RuntimeError, match="nms_padded: boxes should be a 3d tensor, got 4D"):
        run(backend, nms_padded, boxes[None, None], scores[None], 0.5)
