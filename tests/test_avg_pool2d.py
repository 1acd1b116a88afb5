"""avg_pool2d against torch's and the float64 oracle: values, gradients, layouts, containment, determinism."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from oracle import Arguments, check, error, evaluate
from pools import views

from fastnorm.functional import avg_pool2d

EVERY_ISA = True

# kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
WINDOWS = {
    "2x2 s2": (2, 2, 0, False, True, None),  # LeNet, DenseNet: a kernel of its own
    "2x2 s2 ceil": (2, 2, 0, True, True, None),  # the last window is cut off where the size is odd
    "2x2 s2 p1": (2, 2, 1, False, False, None),
    "3x3 s1 p1": (3, 1, 1, False, True, None),  # Inception
    "3x3 s1 p1 inside": (3, 1, 1, False, False, None),  # edges have divisors of their own
    "3x3 s2 p1 ceil": (3, 2, 1, True, False, None),
    "3x3 s2 p1 ceil padded": (3, 2, 1, True, True, None),
    "uneven": ((2, 3), (1, 2), (1, 0), False, True, -3),
    "wide": (5, 3, 2, True, True, 7),
    "gaps": (2, 5, 1, False, False, None),  # a stride larger than the window: inputs in no window
    "beyond": (2, 3, 1, True, False, None),  # windows that begin in the padding after the input: no position inside
    "one": (1, 1, 0, False, True, None),
    "row": ((1, 4), (1, 3), 0, True, True, None),
}
# Whole vectors and not, fewer channels or columns than a vector, one row, a plane smaller than a window's reach.
SHAPES = [
    (2, 3, 9, 11), (1, 8, 6, 16), (2, 6, 7, 7), (1, 1, 8, 37), (3, 7, 1, 13), (1, 35, 4, 5), (1, 67, 4, 3), (4, 8, 8),
]  # fmt: skip


def results(function, x, window, dy, dtype=None):
    return evaluate(lambda a: function(a.x, *window), Arguments(x, dy=dy), dtype)


def torchs(x, window):
    """torch's values, or None where it refuses the window."""
    try:
        return F.avg_pool2d(x, *window)
    except RuntimeError:
        return None


@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_gradients(backend, window):
    window, ran = WINDOWS[window], 0
    for shape, layout, dtype in itertools.product(SHAPES, LAYOUTS, DTYPES):
        x = to_layout(torch.randn(shape, dtype=torch.float64).to(dtype), layout).to(backend.device)
        y = torchs(x, window)
        if y is None:
            continue
        ran += 1
        ours = avg_pool2d(x, *window)
        assert ours.shape == y.shape and ours.stride() == y.stride()
        dy = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(backend.device)
        check(results(avg_pool2d, x, window, dy), results(F.avg_pool2d, x, window, dy),
              results(F.avg_pool2d, x, window, dy, torch.float64))  # fmt: skip
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(avg_pool2d(leaf, *window), leaf, dy)
        assert dx.stride() == x.stride()
    assert ran > 0


LARGE = {
    "whole": ((3, 5, 19, 23), {"kernel_size": (19, 23)}),  # a vector is shorter than a row
    "whole, small": ((5, 20, 7, 7), {"kernel_size": 7}),  # ResNet's, DenseNet's last
    "whole, padded": ((2, 3, 5, 6), {"kernel_size": (9, 10), "padding": 2}),
    "several chunks": ((1, 2, 83, 101), {"kernel_size": (83, 101)}),
    "overlapping": ((2, 3, 40, 41), {"kernel_size": 17, "stride": 1, "padding": 8}),
    "side by side": ((2, 3, 34, 51), {"kernel_size": 17}),
    "stride 2": ((1, 3, 34, 90), {"kernel_size": (20, 33), "stride": 2, "count_include_pad": False, "padding": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LARGE)
def test_large_windows(backend, case, layout):
    shape, keywords = LARGE[case]
    for dtype in (torch.float32, torch.bfloat16):
        x = to_layout(torch.randn(shape).to(dtype), layout).to(backend.device)
        dy = torch.randn_like(F.avg_pool2d(x, **keywords))
        both = [evaluate(lambda a, f=f: f(a.x, **keywords), Arguments(x, dy=dy)) for f in (avg_pool2d, F.avg_pool2d)]
        check(*both, evaluate(lambda a: F.avg_pool2d(a.x, **keywords), Arguments(x, dy=dy), torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_accuracy(backend, layout):
    for window in ((2,), (3, 1, 1), (40, 40), (15, 3)):
        x = to_layout(torch.randn(1, 20, 40, 40) * 0.1 + 1e4, layout).to(backend.device)
        assert error(avg_pool2d(x, *window), F.avg_pool2d(x.double(), *window)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_windows(backend, value, layout):
    for shape, window in itertools.product([(2, 3, 9, 19), (1, 19, 6, 7), (2, 2, 7, 40)], WINDOWS.values()):
        x = torch.randn(shape)
        x[torch.rand(shape) < 0.05] = value
        x = to_layout(x, layout).to(backend.device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ours, theirs = (f(leaf, *window) for f, leaf in zip((avg_pool2d, F.avg_pool2d), leaves, strict=True))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        dy = torch.randn(ours.shape)
        dy[torch.rand(dy.shape) < 0.05] = value
        dy = dy.to(backend.device)
        gradients = (torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip((ours, theirs), leaves, strict=True))
        torch.testing.assert_close(*gradients, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_what_is_exact_stays_so(backend):
    """Averages of equal numbers, and sums that have no rounding."""
    for layout, window in itertools.product(LAYOUTS, ((7,), (3, 2, 1, False, False), (3, 1, 1, True, False), (2,))):
        x = to_layout(torch.full((2, 5, 21, 21), 3.0), layout).to(backend.device)
        assert (avg_pool2d(x, *window) == 3).all()
        x = to_layout(torch.randint(-8, 8, (2, 5, 21, 21)).double(), layout).to(backend.device)
        assert torch.equal(avg_pool2d(x, *window), F.avg_pool2d(x, *window))


def test_strides_alignment_and_expanded_gradients(backend):
    for (name, x), window in itertools.product(views(backend.device).items(), ("3x3 s1 p1", "2x2 s2")):
        y, z = avg_pool2d(x, *WINDOWS[window]), F.avg_pool2d(x, *WINDOWS[window])
        assert y.stride() == z.stride(), name
        torch.testing.assert_close(y, z, msg=name)
        leaf, other = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        avg_pool2d(leaf, *WINDOWS[window]).sum().backward()
        F.avg_pool2d(other, *WINDOWS[window]).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, msg=name)


def test_threads_make_no_difference(threads):
    shapes = ((4, 24, 45, 52), (3, 6, 33, 20), (40, 30, 7, 7))
    for shape, layout, window in itertools.product(shapes, LAYOUTS, ("2x2 s2", "3x3 s1 p1 inside", "wide", "gaps")):
        x = to_layout(torch.randn(shape), layout).requires_grad_()
        runs = []
        for count in (1, 2, 5):
            threads(count)
            y = avg_pool2d(x, *WINDOWS[window])
            dy = torch.linspace(-1, 1, y.numel()).view_as(y)
            runs.append((y.detach(), torch.autograd.grad(y, x, dy)[0]))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_is_the_same_in_any_batch(backend, dtype, layout):
    """One alone is work for narrow vectors, all together for the widest."""
    samples = 2 if backend.small else 4
    x = to_layout(torch.randn(samples, 67, 9, 11, dtype=dtype, device=backend.device), layout).requires_grad_()
    for window in WINDOWS.values():
        y = avg_pool2d(x, *window)
        dy = torch.randn_like(y)
        dx = torch.autograd.grad(y, x, dy)[0]
        for i in range(samples):
            alone = x.detach()[i : i + 1].requires_grad_()
            z = avg_pool2d(alone, *window)
            assert torch.equal(z, y[i : i + 1])
            assert torch.equal(torch.autograd.grad(z, alone, dy[i : i + 1])[0], dx[i : i + 1])


def test_every_element_is_written_and_none_beside(backend):
    """Memory is handed out full of NaN here; windows with gaps between them leave most inputs without one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for shape, layout, window in itertools.product([(2, 8, 9, 16), (1, 3, 5, 7)], LAYOUTS, WINDOWS.values()):
            x = to_layout(torch.randn(shape, device=backend.device), layout).requires_grad_()
            y = avg_pool2d(x, *window)
            assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(before)


def test_empty_batch_and_unbatched(backend):
    for layout in LAYOUTS:
        x = to_layout(torch.ones(0, 3, 8, 8, device=backend.device), layout).requires_grad_()
        y, z = avg_pool2d(x, 2), F.avg_pool2d(x, 2)
        assert y.shape == z.shape and y.stride() == z.stride()
        y.sum().backward()
        assert x.grad.shape == x.shape
    image = torch.randn(3, 8, 8, device=backend.device)
    assert torch.equal(avg_pool2d(image, 2), avg_pool2d(image[None], 2)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_kept(backend, layout):
    x = to_layout(torch.randn(2, 8, 16, 16, device=backend.device), layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        avg_pool2d(x, 3, 2, 1)
    assert sum(t.numel() for t in kept) == 0


def test_integers_are_torchs():
    x = torch.randint(-100, 100, (2, 3, 8, 8))
    assert torch.equal(avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1))
