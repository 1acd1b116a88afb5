"""max_pool2d's derivatives of every kind, torch.func, torch.compile, export, autocast, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from pools import check_checkpointing, check_export, check_inductor, check_one_graph, check_torch_func
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap

import fastnorm
from fastnorm.functional import max_pool2d

WINDOWS = {"3x3 s2 p1": (3, 2, 1), "2x2": (2,), "dilated": ((2, 1), 1, (1, 0), 3, True)}


def image(*shape, dtype=torch.float64):
    """No two values of it are close."""
    x = torch.randperm(torch.Size(shape).numel()).to(dtype)
    return (x / x.numel()).view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_gradcheck(backend, window, layout):
    x = to_layout(image(2, 4, 5, 6), layout).to(backend.device).requires_grad_()

    def function(x):
        return max_pool2d(x, *WINDOWS[window])

    more = {} if backend.small else {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(function, x, **more)
    assert gradgradcheck(function, x, **({} if backend.small else {"check_batched_grad": True}))
    if not backend.small:
        assert gradcheck(function, x, check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(function, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("window", ["3x3 s2 p1", "2x2"])
def test_torch_func(window):
    x, v, xs = image(2, 3, 6, 4), image(2, 3, 6, 4), image(5, 2, 3, 6, 4)

    def function(f):
        return lambda x: f(x, *WINDOWS[window])

    check_torch_func((function(max_pool2d), function(F.max_pool2d)), x, v, xs)


def test_vmap_of_channels_last_and_indices():
    xs = to_layout(torch.randn(5, 2, 8, 6, 6).flatten(0, 1), "channels_last").unflatten(0, (5, 2))
    for a, b in zip(*(vmap(lambda x, f=f: f(x, 3, 2, 1, return_indices=True))(xs) for f in (max_pool2d, F.max_pool2d)),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_dual_numbers():
    x, v = image(2, 3, 6, 5), image(2, 3, 6, 5)
    tangents = []
    for f in (max_pool2d, F.max_pool2d):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), 3, 2, 1)).tangent)
    assert torch.equal(*tangents)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    functions = fastnorm.MaxPool2d(3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)
    check_checkpointing(functions, reentrant, rtol=0, atol=0)


def test_backward_twice_and_unused_results():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    y, indices = max_pool2d(x, 2, return_indices=True)
    assert not indices.requires_grad
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_has_torchs_dtypes(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert max_pool2d(x, 2).dtype == F.max_pool2d(x, 2).dtype


class Network(nn.Module):
    def __init__(self, package):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = package.MaxPool2d(3, 2, 1), package.MaxPool2d(2, return_indices=True, ceil_mode=True)
        self.unpool = package.MaxUnpool2d(2)

    def forward(self, x):
        y, indices = self.second(self.first(self.conv(x)))
        return self.unpool(y, indices).square().sum(dim=(2, 3))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_in_one_graph(dynamic, layout):
    check_one_graph(Network(fastnorm), Network(nn), layout, dynamic)


def test_inductor():
    def function(x):
        y, indices = max_pool2d(x * 2, 3, 2, 1, return_indices=True)
        return y.sin() + indices

    check_inductor(function)


def test_transform_inside_compile():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 6, 6)

    def gradient(x):
        return grad(lambda x: max_pool2d(x, 2).square().sum())(x)

    assert torch.equal(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


def test_export():
    check_export(Network(fastnorm))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = to_layout(torch.randn(2, 6, 5, 8), layout)
    geometry = ([3, 2], [2], [1, 1], [1])
    for tensor in (x, x.clone().requires_grad_()):
        for flags in ((False, False), (True, True)):
            forward = (tensor, *geometry, True, *flags)
            torch.library.opcheck(torch.ops.fastnorm.max_pool2d_forward.default, forward)
    _, offset, _ = torch.ops.fastnorm.max_pool2d_forward(x, *geometry, True, True, False)
    dy = torch.randn(offset.shape, requires_grad=True)
    backward = (dy, offset, 5, 8, *geometry, layout == "channels_last")
    torch.library.opcheck(torch.ops.fastnorm.max_pool2d_backward.default, backward)


def test_meta_device():
    x = torch.empty(2, 3, 9, 9, device="meta")
    for ceil in (False, True):
        y, indices = max_pool2d(x, 2, ceil_mode=ceil, return_indices=True)
        assert y.shape == indices.shape == F.max_pool2d(x, 2, ceil_mode=ceil).shape and y.is_meta
