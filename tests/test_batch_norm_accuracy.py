"""Offset and extreme inputs, and results that do not depend on threads, runs or the rest of the batch."""

import itertools

import pytest
import torch
from conftest import LAYOUTS, to_layout
from oracle import Arguments, check, error, evaluate, oracle
from test_batch_norm import by_fastnorm, by_torch, check_case, make

from fastnorm.functional import batch_norm

EVERY_ISA = True

OFFSETS = [(0, 1), (-1, 1), (-100, 1), (-1e4, 1), (-1e5, 1), (1e4, 0.1), (1e6, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean, std", OFFSETS)
def test_error_does_not_grow_with_the_mean(backend, mean, std, layout):
    """Normalised outputs within 2e-5, gradients within 2e-4 of their largest entry, in float32."""
    for shape in [(4, 6, 5, 5)] if backend.small else [(32, 6, 28, 28), (8, 64, 14, 14), (64, 100), (2, 3, 90, 90)]:
        for activation, affine in ((None, False), ("silu", True)):
            a = make(
                shape,
                torch.float32,
                layout,
                activation,
                affine,
                True,
                backend.device,
                affine=affine,
                mean=mean,
                std=std,
            )
            ours, exact = evaluate(by_fastnorm, a), oracle(a)
            scale = 1 if activation is None else exact.y.abs().max()
            assert ((ours.y.cpu() - exact.y).abs().max() / scale) < 2e-5
            for name, g in ours.gradients.items():
                assert error(g, exact.gradients[name]) < 2e-4, name
            assert error(ours.running_mean, exact.running_mean) < 1e-6
            assert error(ours.running_var, exact.running_var) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean, std", OFFSETS[3:])
def test_second_derivatives_of_offset_inputs(mean, std, layout):
    a = make((6, 4, 5, 5), torch.float32, layout, "silu", mean=mean, std=std)
    results = []
    for dtype in (torch.float32, torch.float64):
        x, w = a.x.to(dtype).requires_grad_(), a.weight.to(dtype).requires_grad_()
        y = batch_norm(x, None, None, w, None, True, activation="silu")
        (dx,) = torch.autograd.grad((y * a.dy.to(dtype)).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx * a.dy.to(dtype)).sum(), [x, w]))
    for ours, exact in zip(*results, strict=True):
        assert error(ours, exact) < 2e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [0.0, 1e4])
def test_an_outlier_where_the_shift_is_taken(backend, layout, first):
    """The shifted sums start from the first values: those far from all others must not spoil the rest."""
    a = make((4, 3, 9, 9), torch.float32, layout, device=backend.device)
    a.x[0, :, 0, 0] = first
    ours, exact = evaluate(by_fastnorm, a), oracle(a)
    assert error(ours.y, exact.y) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15, 1e25, 1e30])
def test_huge_and_tiny_values(backend, layout, scale):
    """Squares of 1e25 overflow float32, the variance's reciprocal root does not."""
    a = make((4, 6, 5, 5), torch.float32, layout, device=backend.device, mean=0, std=1)
    a.x, a.running_mean, a.running_var = a.x * scale, None, None
    exact = oracle(a)
    assert error(evaluate(by_fastnorm, a).y, exact.y) < 1e-5


def test_constant_channels(backend):
    for layout, value in itertools.product(LAYOUTS, (0.0, 3.0, -1e6)):
        x = to_layout(torch.full((4, 6, 5, 5), value, device=backend.device), layout)
        y = batch_norm(x, None, None, training=True)
        assert y.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_has_its_digits_in_the_tail(backend, dtype):
    """1 + erf() loses them from -1 on down, and is 0 at -6."""
    x = torch.linspace(-12, 8, 401 if backend.small else 20001, dtype=dtype, device=backend.device)
    x = torch.cat([x, torch.tensor([-1e-3, 0.0, 1e-3, -40.0], dtype=dtype, device=backend.device)]).view(1, 1, -1)
    mean, var = torch.zeros(1, dtype=dtype, device=backend.device), torch.ones(1, dtype=dtype, device=backend.device)
    x.requires_grad_()
    y = batch_norm(x, mean, var, eps=0, activation="gelu")
    (slope,) = torch.autograd.grad(y.sum(), x)
    z = x.detach().double()
    cdf, density = torch.special.erfc(-z / 2**0.5) / 2, torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    # What is squared and the exponent are rounded; near -0.75 the slope's two terms cancel.
    allowed = torch.finfo(dtype).eps * (4 + 2 * z * z)
    assert ((y - z * cdf).abs() <= allowed * (z * cdf).abs() + 1e-38).all()
    assert ((slope - (cdf + z * density)).abs() <= allowed * (cdf + (z * density).abs()) + 1e-38).all()
    infinite = torch.tensor([[[float("inf"), -float("inf")]]], dtype=dtype, device=backend.device)
    y = batch_norm(infinite, mean, var, eps=0, activation="gelu")
    assert y[0, 0, 0] == float("inf") and y[0, 0, 1].isnan()  # as torch's in float64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_channel(backend, layout, value):
    for activation, residual, training in itertools.product((None, "relu", "silu"), (False, True), (True, False)):
        a = make((4, 6, 5, 5), torch.float32, layout, activation, residual, training, backend.device)
        a.x[1, 2, 3, 3] = value
        ours, theirs = evaluate(by_fastnorm, a), evaluate(by_torch, a)
        assert torch.equal(ours.y.isnan(), theirs.y.isnan()) and torch.equal(ours.y.isinf(), theirs.y.isinf())
        for name in ("x", "weight", "bias", "residual"):
            if name in ours.gradients:
                good = [0, 1, 3, 4, 5]
                g = ours.gradients[name]
                assert torch.isfinite(g[good] if g.dim() == 1 else g[:, good]).all(), name
        if training:
            for name in ("running_mean", "running_var"):
                assert torch.equal(getattr(ours, name).isfinite(), getattr(theirs, name).isfinite()), name
        good = [0, 2, 3] if not training else []
        torch.testing.assert_close(ours.y[good], theirs.y[good], rtol=1e-5, atol=1e-5)


def test_nan_in_residual_parameters_and_gradient(backend):
    for name in ("residual", "weight", "bias", "dy"):
        a = make((4, 6, 5, 5), torch.float32, "planes", "relu", True, True, backend.device)
        getattr(a, name).view(-1)[3] = float("nan")
        ours, theirs = evaluate(by_fastnorm, a), evaluate(by_torch, a)
        for n, t in ours.tensors().items():
            assert torch.equal(t.isnan(), theirs.tensors()[n].isnan()), (name, n)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 64, 64, 64), (9, 60, 64, 64), (3, 40, 150, 151)], ids=str)
def test_outputs_larger_than_the_caches(shape, layout, threads):
    """They reach memory another way; the last two end amid a chunk of rows, or have planes off any cache line."""
    for count, training in ((1, True), (3, True), (2, False)):
        threads(count)
        check_case(make(shape, torch.float32, layout, "relu", True, training))


# ---- Bitwise reproducible --------------------------------------------------------------------------------------------

# More and fewer channels than 4 * threads, and rows of several chunks.
THREADED = [
    (8, 3, 60, 60),
    (16, 6, 28, 28),
    (4, 64, 20, 20),
    (2, 2, 300, 300),
    (700, 130),
    (3, 40, 41, 43),
    (1, 5, 70001),
]


@pytest.mark.parametrize("shape", THREADED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_runs_do_not_matter(shape, layout, threads):
    if layout == "channels_last" and len(shape) != 4:
        return
    for dtype, training in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
        a = make(shape, dtype, layout, "silu", True, training)
        results = []
        for count in (1, 2, 3, 5, 5, 1):
            threads(count)
            results.append(evaluate(by_fastnorm, a).tensors())
        for other in results[1:]:
            assert all(torch.equal(t, other[name]) for name, t in results[0].items())
        threads(2)
        check(evaluate(by_fastnorm, a), evaluate(by_torch, a), oracle(a))


def test_runs_and_schedules_do_not_matter(backend):
    if backend.name == "cuda_emulation":
        from cuda_emulator import SCHEDULES, configure

        settings = [lambda s=s, b=b: configure(schedule=s, blocks_at_once=b, seed=b) for s in SCHEDULES for b in (1, 3)]
    else:
        settings = [lambda: None] * 3
    for shape, layout in itertools.product([(3, 5, 9, 7), (40, 9), (2, 2, 40, 40)], LAYOUTS):
        a = make(shape, torch.float32, layout, "relu", True, True, backend.device)
        results = []
        for setting in settings:
            setting()
            results.append(evaluate(by_fastnorm, a).tensors())
        for other in results[1:]:
            assert all(torch.equal(t, other[name]) for name, t in results[0].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_does_not_depend_on_its_batch_in_evaluation(backend, layout):
    n = 3 if backend.small else 40
    for dtype, activation in itertools.product((torch.float32, torch.bfloat16), (None, "relu", "gelu")):
        a = make((n, 6, 9, 7), dtype, layout, activation, True, False, backend.device)
        whole = by_fastnorm(a)
        for i in (0, n - 1):
            one = Arguments(**{**a.__dict__, "x": a.x[i : i + 1], "residual": a.residual[i : i + 1]})
            assert torch.equal(by_fastnorm(one)[0], whole[i])
