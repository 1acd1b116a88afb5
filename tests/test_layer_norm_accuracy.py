"""Layer norm where float32 is short: offsets, outliers, overflow, underflow, NaN, Inf; and over thousands of rows."""

import math

import pytest
import torch
from oracle import error
from test_layer_norm import by_fastnorm, by_torch, exact, forward, make

EVERY_ISA = True

PLACES = {"rows": ((16, 768), -1), "tiles": ((2, 96, 7, 9), 1), "long_rows": ((2, 10000), -1)}


def places(backend):
    return {"rows": ((5, 70), -1), "tiles": ((2, 9, 3, 5), 1)} if backend.small else PLACES


@pytest.mark.parametrize("mean, std", [(0, 1), (1e3, 1), (-1e5, 1), (1e6, 1), (1e4, 0.1)])
def test_the_error_does_not_grow_with_the_mean(backend, mean, std):
    for shape, dim in places(backend).values():
        c = make(shape, dim, mean=mean, std=std, device=backend.device)
        c.eps = 1e-12
        ours, right = by_fastnorm(c), exact(c)
        assert error(ours.y, right.y) < 1e-6
        for name, gradient in ours.gradients.items():
            assert error(gradient, right.gradients[name]) < 1e-5, name


def test_an_outlier_in_the_first_column(backend):
    """The sums are taken about the first values of a row."""
    for shape, dim in places(backend).values():
        c = make(shape, dim, device=backend.device)
        c.x.select(dim, 0).fill_(1e4)
        c.eps = 0
        ours, right = by_fastnorm(c), exact(c)
        assert error(ours.y, right.y) < 2e-6
        assert error(ours.gradients["x"], right.gradients["x"]) < 1e-5


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("scale", [1e18, 1e30, 1e37])
def test_sums_that_overflow(backend, scale, rms):
    for shape, dim in places(backend).values():
        c = make(shape, dim, rms=rms, mean=0, std=scale, device=backend.device)
        c.x = c.x.clamp(-1e38, 1e38)
        c.dy = c.dy * 1e-2
        assert error(by_fastnorm(c).y, exact(c).y) < 2e-5


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_squares_that_underflow(backend, rms):
    for shape, dim in places(backend).values():
        c = make(shape, dim, rms=rms, mean=0, std=1e-25, device=backend.device)
        c.eps = 0
        assert error(by_fastnorm(c).y, exact(c).y) < 1e-6


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_constant_rows(backend, rms):
    for shape, dim in places(backend).values():
        c = make(shape, dim, rms=rms, device=backend.device)
        for value in (0.0, 0.1, -3e5):
            c.x.fill_(value)
            ours, right = by_fastnorm(c), exact(c)
            assert error(ours.y, right.y) < 1e-6
            assert error(ours.gradients["x"], right.gradients["x"]) < 1e-5


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_row(backend, value, rms):
    for shape, dim in places(backend).values():
        c = make(shape, dim, activation="relu", rms=rms, parameters="weight", device=backend.device)
        position = tuple(n - 1 for n in shape)
        clean = by_fastnorm(c)
        c.x[position] = value
        ours, theirs = by_fastnorm(c), by_torch(c)
        for name, t in (("y", ours.y), ("x", ours.gradients["x"])):
            wanted = theirs.y if name == "y" else theirs.gradients["x"]
            assert torch.equal(t.isnan(), wanted.isnan()), name
        rows = torch.ones(shape, dtype=torch.bool, device=backend.device)
        rows[tuple(slice(None) if d == dim % len(shape) else p for d, p in enumerate(position))] = False
        assert torch.equal(ours.y[rows], clean.y[rows])


def test_nothing_is_left_from_the_call_before(backend):
    """Fewer pixels than a vector has: its other lanes hold what was there."""
    poisoned, clean = make((2, 6, 8, 9), 1, device=backend.device), make((2, 6, 3, 3), 1, device=backend.device)
    poisoned.x.fill_(math.nan)
    by_fastnorm(poisoned)
    for t in by_fastnorm(clean).tensors().values():
        assert t.isfinite().all()


def test_relu_keeps_nan(backend):
    c = make((3, 5), activation="relu", residual=True, device=backend.device)
    c.residual[1, 2] = math.nan
    y = forward(c, True)[0]
    assert y[1, 2].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("shape, dim", [((40000, 24), -1), ((12, 24, 60, 60), 1)])
def test_parameter_gradients_over_many_rows(shape, dim):
    c = make(shape, dim)
    c.dy = c.dy + 10
    ours, right = by_fastnorm(c), exact(c)
    for name in ("weight", "bias"):
        assert error(ours.gradients[name], right.gradients[name]) < 1e-6, name
