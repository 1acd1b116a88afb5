"""max_pool2d's derivatives of every kind, torch.func, torch.compile, export, autocast, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

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

    def both(transform):
        """Applies it to fastnorm's function and to torch's."""
        torch.testing.assert_close(
            *(transform(lambda x, f=f: f(x, *WINDOWS[window])) for f in (max_pool2d, F.max_pool2d))
        )

    def loss(f):
        return lambda x: f(x).pow(3).sum()

    both(lambda f: grad(loss(f))(x))
    both(lambda f: grad(lambda x: grad(loss(f))(x).square().sum())(x))
    both(lambda f: jvp(f, (x,), (v,)))
    both(lambda f: jvp(grad(loss(f)), (x,), (v,)))
    both(lambda f: jacrev(f)(x))
    both(lambda f: jacfwd(f)(x))
    both(lambda f: hessian(loss(f))(x[:1, :1]))
    both(lambda f: vmap(f)(xs))
    both(lambda f: vmap(f, in_dims=2, out_dims=1)(xs.movedim(0, 2)))
    both(lambda f: vmap(f)(x))  # of unbatched images
    both(lambda f: vmap(vmap(f))(xs))
    both(lambda f: vmap(grad(loss(f)))(xs))
    both(lambda f: vmap(lambda v: torch.func.vjp(f, x)[1](v)[0])(torch.stack([f(x), f(v)])))


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
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    checkpoint(fastnorm.MaxPool2d(3, 2, 1), x, use_reentrant=reentrant).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.max_pool2d(other, 3, 2, 1).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


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
    torch._dynamo.reset()
    ours, theirs = Network(fastnorm), Network(nn)
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n, height in [(4, 8), (5, 8), (6, 12)] if dynamic else [(4, 8)]:
        x = to_layout(torch.randn(n, 3, height, 8), layout)
        y, z = compiled(x), theirs(x)
        torch.testing.assert_close(y, z)
        y.sum().backward(), z.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_inductor():
    torch._dynamo.reset()
    x = torch.randn(3, 6, 8, 8, requires_grad=True)

    def function(x):
        y, indices = max_pool2d(x * 2, 3, 2, 1, return_indices=True)
        return y.sin() + indices

    y, z = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, z)))


def test_transform_inside_compile():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 6, 6)

    def gradient(x):
        return grad(lambda x: max_pool2d(x, 2).square().sum())(x)

    assert torch.equal(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


def test_export():
    model = Network(fastnorm)
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: n},))
    larger = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(larger), model(larger))


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
