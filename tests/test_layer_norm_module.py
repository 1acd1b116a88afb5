"""LayerNorm, LayerNorm2d and RMSNorm as drop-in modules, and through autograd, torch.func, compile and autocast."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap

import fastnorm
from fastnorm.functional import layer_norm, rms_norm

PAIRS = {
    "layer": (fastnorm.LayerNorm, nn.LayerNorm, (4, 6), 6),
    "layer of two": (fastnorm.LayerNorm, nn.LayerNorm, (2, 3, 5), (3, 5)),
    "rms": (fastnorm.RMSNorm, nn.RMSNorm, (4, 6), 6),
}
EACH = pytest.mark.parametrize("cls, torch_cls, shape, size", PAIRS.values(), ids=PAIRS)
FUNCTIONS = pytest.mark.parametrize(
    "function, theirs",
    [(layer_norm, torch.nn.functional.layer_norm), (rms_norm, torch.nn.functional.rms_norm)],
    ids=["layer", "rms"],
)


@EACH
def test_drop_in(cls, torch_cls, shape, size):
    for arguments in ({}, {"eps": 1e-3}, {"elementwise_affine": False}, {"dtype": torch.float64}):
        ours, theirs = cls(size, **arguments), torch_cls(size, **arguments)
        assert isinstance(ours, torch_cls) and repr(ours) == repr(theirs)
        assert theirs.load_state_dict(ours.state_dict()) and ours.load_state_dict(theirs.state_dict())
        x = torch.randn(shape, dtype=arguments.get("dtype", torch.float32))
        torch.testing.assert_close(ours(x), theirs(x))
    fused = cls(size, activation="relu")
    x, residual = torch.randn(2, *shape)
    torch.testing.assert_close(fused(x, residual), torch.relu(torch_cls(size)(x) + residual))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert repr(other) == repr(fused) and torch.equal(other(x, residual), fused(x, residual))


@EACH
def test_errors_are_torchs(cls, torch_cls, shape, size):
    x = torch.randn(*shape[:-1], shape[-1] + 1)
    for c in (cls, torch_cls):
        with pytest.raises(RuntimeError):
            c(size)(x)
    with pytest.raises(ValueError, match="activation"):
        cls(size, activation="nothing")


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels(backend, format):
    ours, theirs = fastnorm.LayerNorm2d(6).to(backend.device), nn.LayerNorm(6).to(backend.device)
    x = torch.randn(2, 6, 5, 3, device=backend.device).contiguous(memory_format=format)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert y.is_contiguous(memory_format=format)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@FUNCTIONS
def test_gradients(backend, function, theirs):
    x, residual = torch.randn(2, 3, 5, dtype=torch.float64, device=backend.device)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, device=backend.device, requires_grad=True)

    def f(x, weight, residual):
        return function(x, (5,), weight, activation="silu", residual=residual)

    assert torch.autograd.gradcheck(f, (x, weight, residual), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, weight, residual), fast_mode=True)


@FUNCTIONS
def test_transforms(function, theirs):
    x, tangent, weight = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.randn(5)
    torch.testing.assert_close(vmap(lambda t: function(t, (5,), weight))(x), theirs(x, (5,), weight))
    weights = torch.randn(4, 5)
    each = torch.stack([theirs(t, (5,), w) for t, w in zip(x, weights, strict=True)])
    torch.testing.assert_close(vmap(lambda t, w: function(t, (5,), w))(x, weights), each)

    def results(f):
        values = jvp(lambda t: f(t, (5,), weight), (x,), (tangent,))
        return *values, vmap(grad(lambda t: f(t, (5,), weight).square().sum()))(x)

    for ours, right in zip(results(function), results(theirs), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@FUNCTIONS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(function, theirs, dynamic):
    def f(x, w):
        return function(x, (5,), w, activation="gelu")

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 4):
        x, w = torch.randn(rows, 5, requires_grad=True), torch.randn(5, requires_grad=True)
        y, z = compiled(x, w), f(x, w)
        torch.testing.assert_close(y, z)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, w)) for t in (y, z)), strict=True):
            torch.testing.assert_close(a, b)


@FUNCTIONS
def test_autocast(function, theirs):
    x, w = torch.randn(3, 5).bfloat16(), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x, (5,), w).dtype == theirs(x, (5,), w).dtype


@pytest.mark.parametrize("shape, dim", [((4, 6), -1), ((2, 6, 3, 3), 1)])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck(shape, dim, rms):
    ops = torch.ops.fastnorm
    x, residual, addend, dy = torch.randn(4, *shape)
    weight, bias = torch.randn(2, 6)
    config = ((6,), dim, rms, 1e-5, "relu", 0.01)
    arguments = (x, addend, residual, weight, bias, *config, True)
    torch.library.opcheck(ops.layer_norm_forward.default, arguments)
    _, h, stats, mask = ops.layer_norm_forward(*arguments)
    arguments = (dy, h, residual, weight, bias, stats, mask, dy, *config, [True] * 4)
    torch.library.opcheck(ops.layer_norm_backward.default, arguments)
