"""avg_pool2d's derivatives of every kind, torch.func, torch.compile, export, autocast, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from pools import check_checkpointing, check_export, check_inductor, check_one_graph, check_torch_func
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastnorm
from fastnorm.functional import avg_pool2d

WINDOWS = {"3x3 s2 p1": (3, 2, 1, True, False), "2x2": (2,), "uneven": ((2, 1), 1, (1, 0), False, True, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_gradcheck(backend, window, layout):
    x = to_layout(torch.randn(2, 4, 5, 6, dtype=torch.float64), layout).to(backend.device).requires_grad_()

    def function(x):
        return avg_pool2d(x, *WINDOWS[window])

    more = {} if backend.small else {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(function, x, **more)
    assert gradgradcheck(lambda x: function(x).square(), x, **({} if backend.small else {"check_batched_grad": True}))
    if not backend.small:
        assert gradcheck(function, x, check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(lambda x: function(x).square(), x, check_fwd_over_rev=True)


@pytest.mark.parametrize("window", ["3x3 s2 p1", "2x2"])
def test_torch_func(window):
    x, v, xs = (torch.randn(*n, 2, 3, 6, 4, dtype=torch.float64) for n in ((), (), (5,)))

    def function(f):
        return lambda x: f(x, *WINDOWS[window])

    check_torch_func((function(avg_pool2d), function(F.avg_pool2d)), x, v, xs)


def test_dual_numbers():
    x, v = (torch.randn(2, 3, 6, 5, dtype=torch.float64) for _ in range(2))
    for layout in LAYOUTS:
        tangents = []
        for f in (avg_pool2d, F.avg_pool2d):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(to_layout(x, layout), v)
                tangents.append(forward_ad.unpack_dual(f(dual, 3, 2, 1)).tangent)
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    check_checkpointing((fastnorm.AvgPool2d(3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1)), reentrant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_has_torchs_dtypes(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert avg_pool2d(x, 2).dtype == F.avg_pool2d(x, 2).dtype


class Network(nn.Module):
    def __init__(self, package):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = package.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.second = package.AvgPool2d(2, ceil_mode=True)

    def forward(self, x):
        return self.second(self.first(self.conv(x)).sigmoid()).square().sum(dim=(2, 3))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_in_one_graph(dynamic, layout):
    check_one_graph(Network(fastnorm), Network(nn), layout, dynamic)


def test_inductor():
    check_inductor(lambda x: avg_pool2d(x * 2, 3, 2, 1).sin())


def test_export():
    check_export(Network(fastnorm))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = to_layout(torch.randn(2, 6, 5, 8), layout)
    geometry = ([3, 2], [2], [1, 1], True, False, None)
    for tensor in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.fastnorm.avg_pool2d_forward.default, (tensor, *geometry))
    dy = torch.randn_like(F.avg_pool2d(x, *geometry), requires_grad=True)
    backward = (dy, 5, 8, *geometry, layout == "channels_last")
    torch.library.opcheck(torch.ops.fastnorm.avg_pool2d_backward.default, backward)


def test_meta_device():
    x = torch.empty(2, 3, 9, 9, device="meta")
    for ceil in (False, True):
        y = avg_pool2d(x, 2, ceil_mode=ceil)
        assert y.shape == F.avg_pool2d(x, 2, ceil_mode=ceil).shape and y.is_meta
