"""max_pool2d against torch's: values and indices bit for bit, gradients, layouts, what is kept, determinism."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from pools import views

from fastnorm.functional import max_pool2d, max_pool2d_with_indices

EVERY_ISA = True

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = {
    "3x3 s2 p1": (3, 2, 1, 1, False),  # ResNet; with the next two, a kernel of its own
    "2x2 s2": (2, 2, 0, 1, False),  # VGG
    "3x3 s1 p1": (3, 1, 1, 1, False),  # Inception
    "3x3 s2 ceil": (3, 2, 0, 1, True),  # GoogLeNet: the last window hangs over the edge
    "3x3 s2": (3, 2, 0, 1, False),  # AlexNet: the last column is in no window
    "uneven": ((2, 3), (1, 2), (1, 0), 1, False),
    "dilated": (3, 1, 1, 2, False),
    "wide": (5, 3, 2, 1, True),
    "gaps": (2, 5, 1, 1, False),  # stride larger than the window: inputs in no window
    "padding between taps": (2, 1, 1, 3, False),  # windows with no tap inside
    "one": (1, 1, 0, 1, False),
    "row": ((1, 4), (1, 3), 0, 1, True),
}
# Whole vectors and not, fewer channels or columns than a vector, one row, a plane smaller than a window's reach.
SHAPES = [(2, 3, 9, 11), (1, 8, 6, 16), (2, 6, 7, 7), (1, 1, 8, 34), (3, 2, 1, 13), (1, 35, 4, 5), (4, 8, 8)]
KINDS = ("normal", "ties", "nan", "-inf")


def images(shape, kind, dtype=torch.float32):
    """ties: few values, zeros of both signs. nan: several in most windows. -inf: windows with nothing else."""
    x = torch.randn(shape)
    if kind == "ties":
        x = torch.randint(-1, 2, shape) * torch.randint(0, 2, shape).mul(2).sub(1).float()
    if kind == "nan":
        x = torch.where(torch.rand(shape) < 0.3, float("nan"), x.round())
    if kind == "-inf":
        x = torch.where(torch.rand(shape) < 0.7, -float("inf"), x)
    return x.to(dtype)


@contextlib.contextmanager
def deterministic(wanted=True):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        a, b = (torch.where(t.isnan(), 0, t).contiguous().view(bits) for t in (a, b))
    assert torch.equal(a, b)


def torchs(x, window):
    """torch's values and indices, or None where it refuses the window."""
    try:
        return F.max_pool2d(x, *window, return_indices=True)
    except RuntimeError:
        return None


def scatter(dy, indices, shape):
    """dx from the indices, in float64; those of windows without a tap inside are beyond the plane."""
    plane = shape[-1] * shape[-2]
    inside = indices < plane
    dx = torch.zeros(*shape[:-2], plane, dtype=torch.float64, device=dy.device)
    values = torch.where(inside, dy.double(), 0).flatten(-2)
    return dx.scatter_add(-1, torch.where(inside, indices, 0).flatten(-2), values).view(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_values_indices_and_gradients(backend, window, kind):
    window, ran = WINDOWS[window], 0
    for shape, layout, dtype in itertools.product(SHAPES, LAYOUTS, DTYPES):
        x = to_layout(images(shape, kind, dtype), layout).to(backend.device)
        expected = torchs(x, window)
        if expected is None:
            continue
        ran += 1
        y, indices = expected
        if backend.small and indices.stride() != indices.contiguous().stride():
            indices = torch.where(y == -float("inf"), 0, indices)  # as torch's channels_last CUDA kernel
        leaf = x.clone().requires_grad_()
        ours, our_indices = max_pool2d(leaf, *window, return_indices=True)
        assert_same_bits(ours.detach(), y)
        assert_same_bits(our_indices, indices)
        assert_same_bits(max_pool2d(x, *window), y)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(ours, leaf, dy)
        assert dx.stride() == x.stride() and dx.dtype == dtype
        right = scatter(dy, expected[1].cpu() if x.is_cuda else expected[1], shape) if not x.is_cuda else None
        if right is not None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(dx.double(), right, rtol=0, atol=2 * eps * float(right.abs().max()) + 1e-300)
    assert ran > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_torchs_bits(backend, layout, dtype):
    """Sums over windows that overlap are taken in torch's order; what one window alone gives is added to 0."""
    apart, overlapping = ("2x2 s2", "gaps", "row"), ("3x3 s2 p1", "3x3 s1 p1", "dilated")
    for window in apart if dtype.itemsize == 2 else apart + overlapping:
        x = to_layout(images((2, 6, 9, 12), "ties", dtype), layout).to(backend.device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        dy = None
        results = []
        for function, leaf in zip((max_pool2d, F.max_pool2d), leaves, strict=True):
            y = function(leaf, *WINDOWS[window])
            dy = torch.randn_like(y) * images(y.shape, "ties", dtype).to(y) if dy is None else dy
            results.append(torch.autograd.grad(y, leaf, dy)[0])
        assert_same_bits(*results)


@pytest.mark.parametrize("channels", [64, 40])  # whole cache lines in every type, or in indices only
@pytest.mark.parametrize("window", ["3x3 s2 p1", "2x2 s2"])
def test_large_images(window, channels):
    """Outputs that leave the caches, to fresh memory and to memory that was written."""
    for dtype in (torch.float32, torch.bfloat16):
        n = 48 // dtype.itemsize
        x = torch.randint(-99, 99, (n, channels, 112, 112)).to(dtype).contiguous(memory_format=torch.channels_last)
        y, indices = F.max_pool2d(x.requires_grad_(), *WINDOWS[window], return_indices=True)
        (dx,) = torch.autograd.grad(y, x, y)
        for written in (False, True):
            with deterministic(written):  # memory is handed out full of NaN
                ours = max_pool2d(x, *WINDOWS[window], return_indices=True)
                assert torch.equal(ours[0], y) and torch.equal(ours[1], indices)
                assert torch.equal(torch.autograd.grad(ours[0], x, y)[0], dx)


def test_large_windows(backend):
    """More taps than a byte, and than 16 bits, can count; the last one is the whole image."""
    for shape, kernel, type in (
        ((2, 3, 20, 21), 17, torch.int16),
        ((1, 2, 16, 16), 16, torch.uint8),
        ((1, 1, 190, 180), (190, 180), torch.int32),
    ):
        for layout in LAYOUTS:
            x = to_layout(torch.randn(shape), layout).to(backend.device)
            leaf, other = (x.clone().requires_grad_() for _ in range(2))
            y, indices = max_pool2d(leaf, kernel, 2, return_indices=True)
            z, expected = F.max_pool2d(other, kernel, 2, return_indices=True)
            assert torch.equal(y, z) and torch.equal(indices, expected)
            y.sum().backward(), z.sum().backward()
            assert torch.equal(leaf.grad, other.grad)
            _, offset, _ = torch.ops.fastnorm.max_pool2d_forward(x, [kernel] if isinstance(kernel, int) else kernel,
                                                                 [2], [0], [1], False, True, False)  # fmt: skip
            assert offset.dtype == type


def test_strides_alignment_and_expanded_gradients(backend):
    for name, x in views(backend.device).items():
        for window in ("3x3 s2 p1", "2x2 s2"):
            y, indices = max_pool2d(x, *WINDOWS[window], return_indices=True)
            z, expected = F.max_pool2d(x, *WINDOWS[window], return_indices=True)
            assert torch.equal(y, z) and torch.equal(indices, expected), name
            assert y.stride() == z.stride(), name
            leaf, other = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
            max_pool2d(leaf, *WINDOWS[window]).sum().backward()
            F.max_pool2d(other, *WINDOWS[window]).sum().backward()
            assert torch.equal(leaf.grad, other.grad), name


def saved_bytes(function):
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(saved.values()), result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_byte_per_output_is_kept(backend, layout):
    x = to_layout(torch.randn(2, 8, 16, 16, device=backend.device), layout).requires_grad_()
    for indices in (False, True):
        kept, _ = saved_bytes(lambda i=indices: max_pool2d(x, 3, 2, 1, return_indices=i))
        assert kept == 2 * 8 * 8 * 8
        assert kept <= 0.07 * x.numel() * x.element_size()


def test_threads_make_no_difference(threads):
    for layout, window in itertools.product(LAYOUTS, ("3x3 s2 p1", "wide", "3x3 s1 p1")):
        x = to_layout(images((4, 24, 45, 52), "ties"), layout).requires_grad_()
        results = []
        for count in (1, 2, 5):
            threads(count)
            y, indices = max_pool2d(x, *WINDOWS[window], return_indices=True)
            dy = torch.linspace(-1, 1, y.numel()).view_as(y)
            results.append((y.detach(), indices, torch.autograd.grad(y, x, dy)[0]))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_dx_is_written(backend):
    """Memory is handed out full of NaN here; windows with gaps between them leave most inputs without one."""
    with deterministic():
        for layout, window in itertools.product(LAYOUTS, ("gaps", "2x2 s2", "3x3 s2", "padding between taps")):
            x = to_layout(torch.randn(2, 8, 9, 17, device=backend.device), layout).requires_grad_()
            (dx,) = torch.autograd.grad(max_pool2d(x, *WINDOWS[window]).sum(), x)
            assert dx.isfinite().all()


def test_empty_batch_and_unbatched(backend):
    for layout in LAYOUTS:
        x = to_layout(torch.ones(0, 3, 8, 8, device=backend.device), layout).requires_grad_()
        y, indices = max_pool2d(x, 2, return_indices=True)
        z = F.max_pool2d(x, 2)
        assert y.shape == indices.shape == z.shape and y.stride() == z.stride()
        y.sum().backward()
        assert x.grad.shape == x.shape
    image = torch.randn(3, 8, 8, device=backend.device)
    assert torch.equal(max_pool2d(image, 2), max_pool2d(image[None], 2)[0])
    y, indices = max_pool2d_with_indices(image, 2)
    assert torch.equal(image.flatten(1).gather(1, indices.flatten(1)).view_as(y), y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integers_are_torchs(dtype):
    x = torch.randint(0, 100, (2, 3, 8, 8)).to(dtype)
    for a, b in zip(max_pool2d(x, 3, 2, 1, return_indices=True), F.max_pool2d(x, 3, 2, 1, return_indices=True),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b) and a.dtype == b.dtype
