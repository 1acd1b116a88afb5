"""Group norm on offset and extreme inputs, and results that depend on nothing but the sample."""

import itertools

import pytest
import torch
from conftest import DTYPES, LAYOUTS, to_layout
from oracle import error
from test_group_norm import by_fastnorm, by_formula, check_case, in_float64, make, run

from fastnorm.functional import group_norm

EVERY_ISA = True

OFFSETS = [(0, 1), (-1, 1), (-1e4, 1), (-1e5, 1), (1e4, 0.1), (1e6, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean, std", OFFSETS)
def test_error_does_not_grow_with_the_mean(backend, mean, std, layout):
    """Outputs within 2e-6, gradients within 2e-5 of their largest entry, in float32, whatever torch's are."""
    shapes = [((2, 6, 5, 5), 2)] if backend.small else [((4, 64, 14, 14), 32), ((2, 6, 90, 90), 3), ((8, 12, 2, 2), 4)]
    for (shape, groups), activation in itertools.product(shapes, (None, "silu")):
        a = make(shape, groups, torch.float32, layout, activation, False, backend.device, mean=mean, std=std)
        ours, exact = run(by_fastnorm, a), run(by_formula, in_float64(a))
        assert error(ours.y, exact.y) < 2e-6
        for name, gradient in ours.gradients.items():
            assert error(gradient, exact.gradients[name]) < 2e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_of_one_group_may_be_far_apart(backend, layout):
    """Means from -1e4 to 1e4 and scales from 1e-3 to 1e3 in one group."""
    a = make((2, 8, 9, 9), 2, torch.float32, layout, device=backend.device)
    shape = (1, 8, 1, 1)
    scale, shift = torch.logspace(-3, 3, 8).view(shape), torch.linspace(-1e4, 1e4, 8).view(shape)
    a.x = to_layout(a.x.cpu() * scale + shift, layout).to(backend.device)
    check_case(a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_whose_squares_overflow(backend, layout):
    for shape in [(2, 6, 4, 5), (2, 6, 9, 9)]:
        a = make(shape, 3, torch.float32, layout, mean=0.0, std=1.0, device=backend.device)
        a.x = a.x * 1e37
        exact = run(by_formula, in_float64(a))
        assert error(run(by_fastnorm, a).y, exact.y) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_group(backend, value, layout):
    for shape in [(2, 6, 4, 5), (2, 6, 9, 9)]:
        a = make(shape, 3, torch.float32, layout, "relu", device=backend.device)
        clean = by_fastnorm(a)
        a.x[1, 2, 0, 1] = value
        y = by_fastnorm(a)
        assert y[1, 2:4].isnan().all()
        y[1, 2:4] = clean[1, 2:4]
        assert torch.equal(y, clean)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_groups(backend, layout):
    """Variance 0: the bias, whatever the value."""
    for value in (0.0, 0.1, 1e4, 3e7):
        x = to_layout(torch.full((2, 6, 5, 5), value), layout).to(backend.device)
        bias = torch.randn(6, device=backend.device)
        y = group_norm(x, 3, None, bias)
        torch.testing.assert_close(y, bias.view(1, 6, 1, 1).expand_as(y), rtol=0, atol=1e-3 if value > 1 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, groups", [((6, 12, 40, 40), 3), ((1, 6, 150, 150), 2), ((40, 16, 12, 12), 8)], ids=str)
def test_threads_change_nothing(threads, shape, groups, layout):
    for dtype, (activation, residual) in itertools.product(
        (torch.float32, torch.bfloat16), ((None, False), ("relu", True))
    ):
        a = make(shape, groups, dtype, layout, activation, residual)
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            results.append(run(by_fastnorm, a))
        for other in results[1:]:
            assert torch.equal(other.y, results[0].y)
            for name, gradient in other.gradients.items():
                assert torch.equal(gradient, results[0].gradients[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_its_batch(backend, dtype, layout):
    for shape, groups in [((5, 6, 4, 5), 3)] if backend.small else [((5, 6, 4, 5), 3), ((67, 8, 9, 9), 2)]:
        a = make(shape, groups, dtype, layout, "silu", True, backend.device)
        whole = run(by_fastnorm, a)
        for part in (slice(0, 1), slice(1, 4)):
            b = type(a)(**{**a.__dict__, **{n: getattr(a, n)[part].clone() for n in ("x", "residual", "dy")}})
            ours = run(by_fastnorm, b)
            assert torch.equal(ours.y, whole.y[part])
            for name in ("x", "residual"):
                assert torch.equal(ours.gradients[name], whole.gradients[name][part]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_to_run(backend, layout):
    a = make((2, 6, 9, 9), 3, torch.float32, layout, "relu", True, backend.device)
    first, second = run(by_fastnorm, a), run(by_fastnorm, a)
    assert torch.equal(first.y, second.y)
    assert all(torch.equal(g, second.gradients[n]) for n, g in first.gradients.items())
