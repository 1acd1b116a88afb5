"""Convolution: forward and backward of every algorithm against float64, edges, errors, determinism."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from oracle import ACTIVATIONS, activate, error

import fastnorm
from benchmarks.common import peak_bytes
from fastnorm.functional import conv2d

EVERY_ISA = True

# x, weight, stride, padding, dilation, groups; in each what decides between the kernels' ways.
CASES = {
    "3x3": ((2, 5, 9, 11), (7, 5, 3, 3), 1, 1, 1, 1),
    "3x3, whole vectors": ((1, 32, 8, 8), (32, 32, 3, 3), 1, 1, 1, 1),
    "3x3, no padding": ((2, 17, 6, 7), (33, 17, 3, 3), 1, 0, 1, 1),
    "3x3, padding of 2": ((1, 3, 5, 6), (6, 3, 3, 3), 1, (2, 1), 1, 1),
    "3x3, half a panel, several sums": ((1, 90, 5, 9), (7, 90, 3, 3), 1, 1, 1, 1),
    "1x1": ((2, 18, 7, 5), (20, 18, 1, 1), 1, 0, 1, 1),
    "1x1, groups, several sums": ((3, 300, 4, 5), (26, 150, 1, 1), 1, 0, 1, 2),
    "1x1, planes of whole vectors": ((2, 19, 8, 8), (13, 19, 1, 1), 1, 0, 1, 1),
    "1x1 s2": ((2, 6, 7, 8), (9, 6, 1, 1), 2, 0, 1, 1),
    "5x5 of one channel": ((3, 1, 12, 12), (6, 1, 5, 5), 1, 2, 1, 1),
    "5x5 of three, long rows": ((2, 3, 9, 40), (20, 3, 5, 5), 1, 2, 1, 1),
    "5x5 of four, short rows": ((2, 4, 14, 14), (16, 4, 5, 5), 1, 0, 1, 1),
    "7x7 s2 of three": ((2, 3, 15, 18), (8, 3, 7, 7), 2, 3, 1, 1),
    "5x5 of three, whole panels": ((1, 3, 8, 9), (96, 3, 5, 5), 1, 2, 1, 1),
    "3x3 s2": ((2, 8, 9, 10), (12, 8, 3, 3), 2, 1, 1, 1),
    "s3, asymmetric": ((1, 4, 11, 13), (5, 4, 2, 3), (3, 2), (1, 2), 1, 1),
    "dilated": ((1, 6, 13, 12), (4, 6, 3, 2), 1, 2, (2, 3), 1),
    "dilated s2": ((1, 3, 12, 13), (4, 3, 3, 3), 2, 3, 2, 1),
    "groups": ((2, 6, 7, 8), (9, 2, 3, 3), 1, 1, 1, 3),
    "groups, whole panels": ((1, 10, 7, 8), (64, 5, 3, 3), 1, 1, 1, 2),
    "depthwise": ((2, 9, 8, 10), (9, 1, 3, 3), 1, 1, 1, 9),
    "depthwise s2, twice as many": ((2, 4, 9, 9), (8, 1, 5, 5), 2, 2, 1, 4),
    "depthwise 7x7": ((1, 19, 9, 41), (19, 1, 7, 7), 1, 3, 1, 19),
    "depthwise 5x5, long rows": ((1, 20, 6, 75), (20, 1, 5, 5), 1, 2, 1, 20),
    "depthwise 7x7, short rows": ((3, 37, 7, 7), (37, 1, 7, 7), 1, 3, 1, 37),
    "depthwise 1x3": ((2, 20, 6, 9), (20, 1, 1, 3), 1, (0, 1), 1, 20),
    "depthwise 5x5 s2, in parts": ((1, 3, 70, 131), (3, 1, 5, 5), 2, 2, 1, 3),
    "depthwise, long rows": ((2, 20, 5, 75), (20, 1, 3, 3), 1, 1, 1, 20),
    "depthwise s2, long rows": ((1, 37, 9, 70), (37, 1, 3, 5), (1, 2), (1, 2), (2, 1), 37),
    "3x3, a panel and half": ((2, 3, 7, 45), (13, 3, 3, 3), 1, 1, 1, 1),
    "groups, long rows": ((2, 6, 4, 50), (9, 2, 3, 3), 1, 1, 1, 3),
    "padding beyond the window": ((1, 2, 3, 4), (3, 2, 2, 2), 1, 4, 1, 1),
    "one pixel": ((3, 7, 1, 1), (5, 7, 3, 3), 1, 1, 1, 1),
    "window of the image": ((2, 3, 6, 5), (4, 3, 6, 5), 1, 0, 1, 1),
    "steps beyond the window": ((1, 3, 11, 10), (4, 3, 2, 1), (4, 3), 0, 1, 1),
}
WINOGRAD = ("winograd", "winograd_2x2")
COMPUTES = {
    "im2col": lambda case: True,
    **dict.fromkeys(WINOGRAD, lambda case: CASES[case][1][2:] == (3, 3) and CASES[case][2] == CASES[case][4] == 1),
    "direct": lambda case: CASES[case][1][1] <= 4,
    "depthwise": lambda case: CASES[case][1][1] == 1 and CASES[case][5] == CASES[case][1][0],
}
KERNELS = [(a, c) for a, c in itertools.product(COMPUTES, CASES) if COMPUTES[a](c)]


def skip_what_is_missing(backend, algorithm, dtype=torch.float32):
    if (backend.device == "cuda" or backend.small) and algorithm not in ("auto", "im2col"):
        pytest.skip("the CUDA kernels are one algorithm")
    if algorithm in WINOGRAD and dtype == torch.float64:
        pytest.skip("float64 goes the exact ways")


def run(function, case, layout, dtype, device, bias=True, exact=False):
    """y, dx, dweight and dbias of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shape, weight_shape, *window = CASES[case]
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in (shape, weight_shape))
    b = torch.randn(weight_shape[0], generator=generator).to(dtype) if bias else None
    wide = torch.float64 if exact else dtype
    leaves = [to_layout(t, layout).to("cpu" if exact else device, wide) for t in (x, weight)]
    leaves += [b.to("cpu" if exact else device, wide)] if bias else []
    leaves = [t.requires_grad_() for t in leaves]
    y = function(*leaves[:2], leaves[2] if bias else None, *window)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(y, leaves, to_layout(dy, layout).to(y.device, y.dtype))
    return [y.detach(), *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm, case", [*KERNELS, *(("auto", case) for case in CASES)])
def test_against_float64(backend, algorithm, case, dtype):
    skip_what_is_missing(backend, algorithm, dtype)
    if backend.small and algorithm == "auto":
        pytest.skip("the CUDA kernels are one algorithm")
    for layout in LAYOUTS:
        exact = run(F.conv2d, case, layout, dtype, backend.device, exact=True)
        torchs = run(F.conv2d, case, layout, dtype, backend.device)
        ours = run(lambda *a: conv2d(*a, algorithm=algorithm), case, layout, dtype, backend.device)
        for name, a, b, c in zip(("y", "dx", "dweight", "dbias"), ours, torchs, exact, strict=True):
            assert a.dtype == dtype
            floor = (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
            if algorithm == "winograd":
                floor = max(floor, 3e-5)
            theirs = error(b, c)
            allowed = floor + (2 * theirs if theirs < 1 else 0)  # torch may be wrong altogether, or NaN
            assert error(a, c) <= allowed, f"{name} {layout}: {error(a, c):.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", (3, 5, 7))
@pytest.mark.parametrize("stride", (1, 2, (2, 1), (1, 2)))
def test_depthwise_rows_of_every_length(kernel, stride, layout):
    """Rows are worked on in pieces, for whose lengths and edges there is code of their own."""
    for width in range(1, 35):
        x, weight = torch.randn(2, 5, 3, width), torch.randn(5, 1, kernel, kernel)
        results = []
        for function, dtype in ((partial(conv2d, algorithm="depthwise"), torch.float32), (F.conv2d, torch.float64)):
            leaves = [to_layout(x, layout).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
            y = function(*leaves, None, stride, kernel // 2, 1, 5)
            dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        for name, ours, exact in zip(("y", "dx", "dweight"), *results, strict=True):
            assert error(ours, exact) < 1e-6, f"{name} {width}: {error(ours, exact):.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_where_most_rows_see_nothing(layout):
    """More of them than are worked on together."""
    x, weight, bias = torch.randn(1, 32, 2, 7), torch.randn(32, 1, 3, 5), torch.randn(32)
    ours, exact = (
        f(to_layout(x, layout).to(dtype), weight.to(dtype), bias.to(dtype), (4, 1), (2000, 2), (2, 1), 32)
        for f, dtype in ((partial(conv2d, algorithm="depthwise"), torch.float32), (F.conv2d, torch.float64))
    )
    assert error(ours, exact) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", (3, 5, 7))
@pytest.mark.parametrize("stride", (1, 2))
def test_depthwise_sees_no_other_infinities(kernel, stride, layout):
    """Than those within a window: not beyond an edge, nor in the next piece of a row or in another channel."""
    for width in (5, 7, 14, 19):
        for at in (0, width // 2, width - 1):
            x, weight = torch.randn(1, 3, 4, width), torch.randn(3, 1, kernel, kernel)
            x[0, 1, 2, at] = float("inf")
            window = (None, stride, kernel // 2, 1, 3)
            results = []
            for function in (partial(conv2d, algorithm="depthwise"), F.conv2d):
                leaves = [to_layout(x, layout).requires_grad_(), weight.clone().requires_grad_()]
                y = function(*leaves, *window)
                dy = torch.ones_like(y)
                (dweight,) = torch.autograd.grad(y, leaves[1], dy, retain_graph=True)
                (dx,) = torch.autograd.grad(y, leaves[0], torch.where(y.detach().isinf(), y.detach(), dy))
                results.append((y, dweight, dx))
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours.isfinite(), theirs.isfinite()), (width, at)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_results(layout):
    for algorithm, case in KERNELS:
        torchs = run(F.conv2d, case, layout, torch.float32, "cpu")
        ours = run(lambda *a, algorithm=algorithm: conv2d(*a, algorithm=algorithm), case, layout, torch.float32, "cpu")
        for a, b in zip(ours[:2], torchs[:2], strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last) == b.is_contiguous(
                memory_format=torch.channels_last
            ), (algorithm, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradient_has_the_weights_layout(backend, layout):
    """So that autograd need not copy it; whoever computes it."""
    for algorithm, case in KERNELS:
        for device in (backend.device, "meta"):
            if device == "cpu" or algorithm == "im2col":
                x, weight = (to_layout(torch.randn(s), layout).to(device) for s in CASES[case][:2])
                leaf, (stride, padding, dilation, groups) = weight.requires_grad_(), CASES[case][2:]
                y = conv2d(x, leaf, None, stride, padding, dilation, groups, algorithm=algorithm)
                (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
                assert gradient.is_contiguous(memory_format=torch.channels_last) == weight.is_contiguous(
                    memory_format=torch.channels_last
                ), (algorithm, case, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", COMPUTES)
def test_weights_gradient_of_many_blocks(algorithm, layout):
    """Enough of them for several sums, which are added up in the end."""
    groups = 8 if algorithm == "depthwise" else 1
    x, dy = torch.randn(40, 8 if groups > 1 else 3, 16, 16), torch.randn(40, 32 if groups == 1 else 8, 16, 16)
    weight = torch.randn(dy.shape[1], x.shape[1] // groups, 3, 3)

    def gradients(function, dtype):
        leaves = [
            to_layout(weight.to(dtype), layout).requires_grad_(),
            torch.zeros(len(weight), dtype=dtype).requires_grad_(),
        ]
        y = function(to_layout(x.to(dtype), layout), *leaves, 1, 1, 1, groups)
        return torch.autograd.grad(y, leaves, to_layout(dy.to(dtype), layout))

    ours = gradients(lambda *a: conv2d(*a, algorithm=algorithm), torch.float32)
    for a, b in zip(ours, gradients(F.conv2d, torch.float64), strict=True):
        assert error(a, b) < (3e-5 if algorithm == "winograd" else 2e-6)


@lru_cache
def large_case(groups, kernel):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, max(groups, 2), 448, 432), (32, 2 if groups == 1 else 1, kernel, kernel)
    x, weight = (torch.randn(s, generator=generator) for s in shapes)
    window = None, 1, kernel // 2, 1, groups
    return x, weight, window, F.conv2d(x.double(), weight.double(), *window).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm, kernel", [*((a, 3) for a in COMPUTES), ("im2col", 1)])
def test_results_larger_than_the_caches(backend, algorithm, kernel, layout):
    """Which are written past them."""
    if backend.device == "cuda" or backend.small:
        pytest.skip("the CPU kernels are meant")
    x, weight, window, exact = large_case(32 if algorithm == "depthwise" else 1, kernel)
    x, weight = (to_layout(t, layout) for t in (x, weight))
    for _ in range(2):  # the first may get memory that was never written, which is left to the caches
        y = conv2d(x, weight, *window, algorithm=algorithm)
        assert (y - exact).abs().max() < (3e-5 if algorithm == "winograd" else 2e-6) * exact.abs().max()
        del y


@pytest.mark.parametrize("dilation", [(2, 1), (1, 2), (2, 2), (3, 3)])
def test_dilated_depthwise_in_bfloat16(backend, dilation):
    """Whose gradient to the weight torch leaves unwritten in channels_last."""
    x, weight, dy = (torch.randn(s).bfloat16() for s in ((2, 16, 10, 70), (16, 1, 3, 3), (2, 16, 10, 70)))

    def gradient(function, dtype, device, create_graph=False):
        # Of one channel, to_layout() would leave the strides as they are.
        leaf = weight.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_()
        inputs, dz = (to_layout(t.to(device, dtype), "channels_last") for t in (x, dy))
        y = function(inputs, leaf, None, 1, dilation, dilation, 16)
        return torch.autograd.grad(y, leaf, dz, create_graph=create_graph)[0].detach()

    exact = gradient(F.conv2d, torch.float64, "cpu")
    assert error(gradient(conv2d, torch.bfloat16, backend.device), exact) < 0.01
    if backend.device == "cpu":
        for algorithm, create_graph in itertools.product(("auto", "torch"), (False, True)):
            ours = gradient(lambda *a: conv2d(*a, algorithm=algorithm), torch.bfloat16, "cpu", create_graph)  # noqa: B023
            assert error(ours, exact) < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, weight_shape, stride, padding, dilation, groups",
    [
        ((1, 8, 14, 3), (32, 8, 3, 3), 2, 0, 1, 1),
        ((1, 24, 14, 4), (12, 8, 3, 3), 2, 0, 1, 3),
        ((2, 8, 20, 4), (16, 8, 3, 3), (1, 3), 1, 1, 1),
        ((2, 5, 35, 1), (7, 5, 3, 3), (1, 2), 2, (1, 2), 1),
        ((2, 3, 7, 1), (16, 3, 2, 2), (1, 2), 3, (1, 2), 1),
        ((3, 17, 7, 1), (34, 1, 3, 1), 2, 1, (1, 2), 17),
        ((2, 9, 1, 9), (12, 3, 3, 3), (2, 1), 3, 2, 3),
        ((1, 8, 20, 1), (16, 1, 3, 3), (1, 2), 1, 1, 8),
        ((1, 8, 1, 1), (33, 8, 3, 3), 3, 1, 1, 1),
        ((2, 8, 35, 1), (4, 8, 7, 3), (1, 2), 2, 1, 1),
    ],
)
def test_where_torch_is_lost(backend, shape, weight_shape, stride, padding, dilation, groups, dtype):
    """oneDNN takes rows of one result with a stride from other memory, and crashes over windows that see nothing."""
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, weight_shape, weight_shape[:1]))
    window = stride, padding, dilation, groups

    def results(function, dtype, device, layout, create_graph=False):
        leaves = [to_layout(t.to(device, dtype), layout).detach().requires_grad_() for t in (x, weight)]
        leaves.append(bias.to(device, dtype).requires_grad_())
        y = function(*leaves, *window)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) / 4, create_graph=create_graph)
        return [t.detach() for t in (y, *gradients)]

    exact = results(F.conv2d, torch.float64, "cpu", "planes")
    algorithms = ("auto", "torch") if backend.device == "cpu" else ("im2col",)
    for layout, algorithm, create_graph in itertools.product(LAYOUTS, algorithms, (False, True)):
        ours = results(partial(conv2d, algorithm=algorithm), dtype, backend.device, layout, create_graph)
        for a, b in zip(ours, exact, strict=True):
            assert error(a, b) < {torch.bfloat16: 0.01, torch.float16: 2e-3}.get(dtype, 2e-6), (layout, algorithm)
            assert a.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [2, 16])
def test_one_image_of_permuted_pixels(backend, terms, dtype):
    """Its batch has a stride that says nothing, by which torch goes in groups: its gradient to the weight is wrong."""
    pixels, weight = torch.randn(9, 11, 3 * terms).to(dtype), torch.randn(12, terms, 3, 3).to(dtype)
    dy = torch.randn(12, 9, 11).to(dtype)

    def gradients(function, dtype, device, layout, create_graph=False):
        x = pixels.to(device, dtype).permute(2, 0, 1)
        leaves = (x if layout else x.contiguous()), to_layout(weight.to(device, dtype), layout or "planes")
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = function(*leaves, None, 1, 1, 1, 3)
        return torch.autograd.grad(y, leaves, dy.to(device, dtype), create_graph=create_graph)

    exact = gradients(F.conv2d, torch.float64, "cpu", None)
    algorithms = ("auto", "torch") if backend.device == "cpu" else ("im2col",)
    for layout, algorithm, create_graph in itertools.product(LAYOUTS, algorithms, (False, True)):
        function = partial(conv2d, algorithm=algorithm)
        for a, b in zip(gradients(function, dtype, backend.device, layout, create_graph), exact, strict=True):
            assert error(a, b) < {torch.bfloat16: 0.01, torch.float16: 2e-3}.get(dtype, 2e-6), (layout, algorithm)


def changes():
    """Ways to write to a weight, most of which leave its version as it is."""
    yield lambda w: w.mul_(-1)
    yield lambda w: w.data.mul_(-1)
    yield lambda w: w.detach().numpy().__imul__(2)
    yield lambda w: w.data[3, 5, 1, 2].neg_()
    yield lambda w: setattr(w, "data", w.data.roll(1, 0))


@pytest.mark.parametrize("algorithm", ["im2col", *WINOGRAD])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_weights_follow_every_change(algorithm, layout):
    """Packed weights are kept between calls: results never depend on it, however the weight was written to."""
    x, first = (to_layout(torch.randn(s), layout) for s in ((2, 40, 9, 9), (36, 40, 3, 3)))
    kept = first.clone()

    def check():
        expected = conv2d(x, kept.clone(), padding=1, algorithm=algorithm)  # a tensor that was never seen before
        for _ in range(5):
            assert torch.equal(conv2d(x, kept, padding=1, algorithm=algorithm), expected)
        return expected

    for change in changes():
        before = check()
        change(kept)
        assert not torch.equal(check(), before)
    # Another layout and window of the input, another algorithm, other groups, other meanings of the same bits, and the
    # same address with another weight.
    for other_layout, window in itertools.product(LAYOUTS, ((1, 1, 1), (1, 0, 1), (2, 2, 2))):
        if algorithm == "im2col" or window[2] == 1:
            y, expected = (conv2d(to_layout(x, other_layout), w, None, *window, algorithm=algorithm)
                           for w in (kept, kept.clone()))  # fmt: skip
            assert torch.equal(y, expected), (other_layout, window)
    for other in ("im2col", *WINOGRAD):
        y, expected = (conv2d(x, w, padding=1, algorithm=other) for w in (kept, kept.clone()))
        assert torch.equal(y, expected), other
    wide = torch.cat([x, x], 1)
    a, b = (conv2d(wide, w, padding=1, groups=2, algorithm=algorithm) for w in (kept, kept.clone()))
    assert torch.equal(a, b)
    square = to_layout(torch.randn(40, 40, 3, 3), layout)
    before = [conv2d(x, square, padding=1, algorithm=algorithm) for _ in range(4)][-1]
    other_way = to_layout(square, next(other for other in LAYOUTS if other != layout)).stride()
    square.data = square.data.as_strided(square.shape, other_way)
    y = conv2d(x, square, padding=1, algorithm=algorithm)
    assert torch.equal(y, conv2d(x, square.clone(), padding=1, algorithm=algorithm)) and not torch.equal(y, before)
    for _ in range(8):
        weight = to_layout(torch.randn(36, 40, 3, 3), layout)
        results = [conv2d(x, weight, padding=1, algorithm=algorithm) for _ in range(4)]
        assert all(torch.equal(r, conv2d(x, weight.clone(), padding=1, algorithm=algorithm)) for r in results)
        del weight


def test_which_weights_are_kept():
    """One that stays is packed in the third call for those after it; one that is written to in between never."""
    x, weight = torch.randn(2, 64, 4, 4), torch.randn(256, 64, 3, 3)
    packed = 4 * weight.nbytes

    def allocates_packed():
        return peak_bytes(lambda: conv2d(x, weight, padding=1, algorithm="winograd")) >= packed

    assert [allocates_packed() for _ in range(5)] == [False, False, True, False, False]
    for _ in range(5):
        weight.mul_(-1)
        assert not allocates_packed()


def test_kept_weights_from_several_threads():
    x, weight = torch.randn(2, 40, 9, 9), torch.randn(36, 40, 3, 3)
    expected = conv2d(x, weight.clone(), padding=1, algorithm="im2col")
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: conv2d(x, weight, padding=1, algorithm="im2col"), range(64)):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("algorithm", ["auto", *COMPUTES])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(backend, algorithm, activation, layout):
    skip_what_is_missing(backend, algorithm)
    case = {"direct": "5x5 of one channel", "depthwise": "depthwise"}.get(algorithm, "3x3")
    exact = run(lambda *a: activate(F.conv2d(*a), activation), case, layout, torch.float32, "cpu", exact=True)
    ours = run(lambda *a: conv2d(*a, activation=activation, algorithm=algorithm), case, layout, torch.float32,
               backend.device)  # fmt: skip
    for a, c in zip(ours, exact, strict=True):
        assert error(a, c) <= 3e-5
    with torch.no_grad():  # where all of them are fused
        x, weight = (to_layout(torch.randn(s), layout).to(backend.device) for s in CASES[case][:2])
        y = conv2d(x, weight, None, *CASES[case][2:], activation=activation, algorithm=algorithm)
        z = F.conv2d(x.cpu().double(), weight.cpu().double(), None, *CASES[case][2:])
        assert (y.cpu() - activate(z, activation)).abs().max() <= 3e-5 * z.abs().max()


@pytest.mark.parametrize("algorithm, case", KERNELS)
def test_infinities_stay_where_they_are_seen(algorithm, case):
    """In the gradient to the weight: a vector's lanes beyond the end of a row must not see the next row."""
    shape, weight_shape, stride, padding, dilation, groups = CASES[case]
    for layout in LAYOUTS:
        x = torch.randn(shape)
        x[0, 0, -1, -1] = torch.inf
        x, weight = to_layout(x, layout), to_layout(torch.randn(weight_shape), layout).requires_grad_()
        y = conv2d(x, weight, None, stride, padding, dilation, groups, algorithm=algorithm)
        dy = to_layout(torch.ones_like(y), layout)
        dweight = torch.autograd.grad(y, weight, dy)[0]
        exact = torch.nn.grad.conv2d_weight(x.double(), weight_shape, dy.double(), stride, padding, dilation, groups)
        assert torch.equal(dweight.isfinite(), exact.isfinite()), layout


def test_strides_alignment_and_expanded_gradients(backend):
    base = torch.randn(2, 12, 11, 18, device=backend.device)
    views = {
        "offset": base.flatten()[1 : 1 + 2 * 4 * 10 * 16].view(2, 4, 10, 16),
        "sliced": base[:, ::3, 1:9, 2:18],
        "transposed": base.transpose(2, 3)[:, :4],
        "channels_last slice": base.contiguous(memory_format=torch.channels_last)[:, :4],
        "expanded": base[:1, :1].expand(3, 4, -1, -1),
    }
    weights = torch.randn(3, 3, 6, 4, device=backend.device).permute(2, 3, 0, 1)
    for name, x in views.items():
        x = x.detach()
        results = []
        for function in (lambda *a: conv2d(*a, algorithm="im2col"), F.conv2d):
            leaves = [t.detach().requires_grad_() for t in (x, weights)]
            y = function(*leaves, None, 1, 1)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-5, name


def test_empty_and_degenerate(backend):
    for shape, weight_shape in (((0, 3, 5, 5), (4, 3, 3, 3)), ((2, 3, 3, 3), (4, 3, 3, 3))):
        for algorithm in ("auto", "im2col"):
            x = torch.randn(shape, device=backend.device, requires_grad=True)
            weight = torch.randn(weight_shape, device=backend.device, requires_grad=True)
            bias = torch.randn(4, device=backend.device, requires_grad=True)
            y, z = conv2d(x, weight, bias, algorithm=algorithm), F.conv2d(x, weight, bias)
            assert y.shape == z.shape
            for a, b in zip(torch.autograd.grad(y.sum(), (x, weight, bias)),
                            torch.autograd.grad(z.sum(), (x, weight, bias)), strict=True):  # fmt: skip
                assert error(a, b) < 1e-5


def test_unbatched_and_named_paddings(backend):
    x, weight, bias = torch.randn(4, 9, 10), torch.randn(6, 2, 4, 3), torch.randn(6)
    x, weight, bias = (t.to(backend.device) for t in (x, weight, bias))
    for padding, dilation in (("same", 1), ("same", (3, 2)), ("valid", 1), (1, 1), ((2, 0), 2)):
        for batch in (x, torch.stack([x, x + 1])):
            ours, theirs = (f(batch, weight, bias, 1, padding, dilation, 2) for f in (conv2d, F.conv2d))
            assert ours.shape == theirs.shape and error(ours, theirs) < 1e-5


@pytest.mark.parametrize("algorithm, case", [k for k in KERNELS if k[1] in ("3x3", "3x3 s2", "1x1", "depthwise",
                                                                            "5x5 of one channel")])  # fmt: skip
def test_neither_threads_nor_batch_change_a_bit(threads, algorithm, case):
    shape, weight_shape, *window = CASES[case]
    x, weight = torch.randn(5, *shape[1:2], 20, 30), torch.randn(weight_shape)
    for layout in LAYOUTS:
        results = []
        for count in (1, 2, 5):
            threads(count)
            leaves = [to_layout(x, layout).requires_grad_(), weight.requires_grad_()]
            y = conv2d(*leaves, None, *window, algorithm=algorithm)
            dy = torch.linspace(-1, 1, y.numel()).view_as(y)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        one = conv2d(to_layout(x[2:3], layout), weight, None, *window, algorithm=algorithm)
        assert torch.equal(one[0], results[0][0][2])


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("terms", [130, 200, 512])
def test_where_filters_come_from_changes_no_bit(algorithm, terms):
    """Made for the call, for some terms of a small batch at a time, or kept from other calls."""
    x, weight = torch.randn(12, terms, 10, 10), torch.randn(40, terms, 3, 3)
    expected = conv2d(x, weight.clone(), padding=1, algorithm=algorithm)
    assert torch.equal(expected[5:6], conv2d(x[5:6], weight.clone(), padding=1, algorithm=algorithm))
    for _ in range(4):
        assert torch.equal(expected, conv2d(x, weight, padding=1, algorithm=algorithm))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, channels", [(1, 2048), (3, 512)])
def test_long_sums_are_as_exact_as_torchs(layout, kernel, channels):
    x = to_layout(torch.randn(2, channels, 6, 6), layout)
    weight = to_layout(torch.randn(32, channels, kernel, kernel), layout)
    exact = F.conv2d(x.double(), weight.double())
    ours, theirs = conv2d(x, weight, algorithm="im2col"), F.conv2d(x, weight)
    assert error(ours, exact) < 2 * error(theirs, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("channels, size", [(64, 12), (128, 14), (512, 7)])
def test_winograd_2x2_is_as_exact_as_torchs(layout, mean, channels, size):
    """Within twice the error of torch's convolution, and mostly better, whatever the mean."""

    def results(function, dtype):
        generator = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randn(s, generator=generator) for s in ((8, channels, size, size), (channels, channels, 3, 3))
        )
        leaves = [to_layout(t, layout).to(dtype).requires_grad_() for t in (x + mean, weight)]
        y = function(*leaves, None, 1, 1)
        dy = torch.randn(y.shape, generator=generator).to(dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, to_layout(dy, layout))

    exact = results(F.conv2d, torch.float64)
    ours = results(lambda *a: conv2d(*a, algorithm="winograd_2x2"), torch.float32)
    theirs = results(F.conv2d, torch.float32)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) < 2 * error(b, c) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("algorithm", ["im2col", *WINOGRAD])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_as_in_plain_sums(backend, algorithm, value):
    """Also where transforms take infinity from infinity, or the sum of two numbers is beyond the largest float32."""
    skip_what_is_missing(backend, algorithm)
    x, weight = torch.randn(1, 20, 9, 9), torch.randn(24, 20, 3, 3) / 8
    x[0, 1, 4, 4], x[0, 2, 0, 8], x[0, 1, 4, 5] = value, float("inf"), value

    def results(function, x, weight):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = function(*leaves, None, 1, 1)
        return y.detach(), *torch.autograd.grad(y, leaves, x[:, :1].expand_as(y))

    for layout in LAYOUTS:
        exact = results(F.conv2d, *(t.double() for t in (x, weight)))
        for activation in (None, "relu"):
            ours = results(lambda *a, k=activation: conv2d(*a, activation=k, algorithm=algorithm),
                           *(to_layout(t, layout).to(backend.device) for t in (x, weight)))  # fmt: skip
            y, z = ours[0].cpu(), exact[0].float()
            torch.testing.assert_close(y, z.relu() if activation else z, equal_nan=True, rtol=1e-3, atol=1e-3)
        # Gradients; relu's are masked.
        ours = results(lambda *a: conv2d(*a, algorithm=algorithm),
                       *(to_layout(t, layout).to(backend.device) for t in (x, weight)))  # fmt: skip
        for a, b in zip(ours[1:], exact[1:], strict=True):
            assert torch.equal(a.cpu().isfinite(), b.float().isfinite())


def test_precision_chooses_winograds_tiles():
    """The default precision of torch keeps its convolution's digits; "high" allows fewer."""
    x, weight = torch.randn(4, 64, 28, 28), torch.randn(64, 64, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), None, 1, 1)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed, algorithm in (
            ("highest", 2 * error(F.conv2d(x, weight, None, 1, 1), exact), "winograd_2x2"),
            ("high", 3e-5, "winograd"),
            ("medium", 3e-5, "winograd"),
        ):
            torch.set_float32_matmul_precision(precision)
            y = conv2d(x, weight, None, 1, 1)
            assert error(y, exact) < allowed
            if fastnorm.info()["cpu_isa"] != "DEFAULT":  # for which nothing of it is chosen
                assert torch.equal(y, conv2d(x, weight, None, 1, 1, algorithm=algorithm))
    finally:
        torch.set_float32_matmul_precision(before)


ERRORS = {
    "channels": (RuntimeError, "to have 3 channels, but got 4", lambda f, x, w: f(x, w[:, :3])),
    "groups": (RuntimeError, "divisible by 4", lambda f, x, w: f(x, w[:, :1], groups=4)),
    "no groups": (RuntimeError, "non-positive groups", lambda f, x, w: f(x, w, groups=0)),
    "dimensions": (RuntimeError, "Expected 3D", lambda f, x, w: f(x[0, 0], w)),
    "weight's dimensions": (RuntimeError, "weight must have 4", lambda f, x, w: f(x, w[0])),
    "window": (RuntimeError, "Kernel size can't be greater", lambda f, x, w: f(x[..., :2], w)),
    "dtype": (RuntimeError, "should be the same", lambda f, x, w: f(x, w.double())),
    "bias' dtype": (RuntimeError, "bias type", lambda f, x, w: f(x, w, torch.zeros(6).double())),
    "bias' shape": (RuntimeError, "1-dimensional with 6", lambda f, x, w: f(x, w, torch.zeros(5))),
    "stride": (RuntimeError, "non-positive stride", lambda f, x, w: f(x, w, stride=0)),
    "padding": (RuntimeError, "negative padding", lambda f, x, w: f(x, w, padding=-1)),
    "dilation": (RuntimeError, "greater than zero", lambda f, x, w: f(x, w, dilation=0)),
    "three strides": (RuntimeError, "list of 2 values", lambda f, x, w: f(x, w, stride=(1, 1, 1))),
    "stride's type": (TypeError, "stride must be an int", lambda f, x, w: f(x, w, stride=1.5)),
    "same with stride": (RuntimeError, "strided", lambda f, x, w: f(x, w, stride=2, padding="same")),
    "padding's name": (RuntimeError, "Invalid padding string", lambda f, x, w: f(x, w, padding="full")),
    "activation": (ValueError, "activation must be", lambda f, x, w: f(x, w, activation="swish")),
    "algorithm": (ValueError, "algorithm must be one of", lambda f, x, w: f(x, w, algorithm="fft")),
    "winograd": (ValueError, "does not compute", lambda f, x, w: f(x, w, stride=2, algorithm="winograd")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    kind, message, call = ERRORS[case]
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    with pytest.raises(kind, match=message) as caught:
        call(conv2d, x, weight)
    assert str(caught.value).startswith("conv2d: ")
    if kind is not ValueError:  # else of a keyword that torch's has not
        with pytest.raises(kind):
            call(F.conv2d, x, weight)


@pytest.mark.parametrize("shape, kernel", [((2, 4, 3, 8), 3), ((0, 4, 3, 8), 3), ((2, 4, 0, 8), 1), ((2, 4, 3, 8), 0)])
def test_dilated_windows_that_do_not_fit(shape, kernel):
    x, weight = torch.randn(shape), torch.randn(6, 4, kernel, 3)
    with pytest.raises(RuntimeError):
        conv2d(x, weight, dilation=2)
    with pytest.raises(RuntimeError):
        torch.func.jvp(partial(conv2d, weight=weight, dilation=2), (x,), (x,))


def test_other_dtypes_are_torchs():
    x, weight = torch.randn(1, 2, 5, 5, dtype=torch.complex64), torch.randn(3, 2, 3, 3, dtype=torch.complex64)
    assert torch.equal(conv2d(x, weight), F.conv2d(x, weight))
    with pytest.raises(RuntimeError):
        conv2d(torch.ones(1, 2, 5, 5, dtype=torch.bool), torch.ones(3, 2, 3, 3, dtype=torch.bool))


def test_a_missing_gradient_is_not_computed(backend):
    x, weight = torch.randn(2, 4, 6, 6, device=backend.device), torch.randn(5, 4, 3, 3, device=backend.device)
    bias = torch.randn(5, device=backend.device)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        if not any(wanted):
            assert not conv2d(*leaves, algorithm="im2col").requires_grad
            continue
        conv2d(*leaves, algorithm="im2col").square().sum().backward()
        others = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        F.conv2d(*others).square().sum().backward()
        for a, b, w in zip(leaves, others, wanted, strict=True):
            assert (a.grad is not None) == w
            assert not w or error(a.grad, b.grad) < 1e-5
