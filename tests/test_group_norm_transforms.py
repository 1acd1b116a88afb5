"""Group norm's derivatives of every kind, torch.func, torch.compile, export, autocast, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.activation import activate
from fastnorm.functional import group_norm, instance_norm


def inputs(shape=(3, 4, 2, 3), residual=True, device="cpu"):
    tensors = [torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    tensors += [torch.randn(shape)] if residual else []
    return [t.to(device, torch.float64) for t in tensors]


def ours(x, w, b, r=None, *, groups=2, activation="silu"):
    return group_norm(x, groups, w, b, activation=activation, residual=r)


def theirs(x, w, b, r=None, *, groups=2, activation="silu"):
    z = F.group_norm(x, groups, w, b)
    return activate(z if r is None else z + r, activation, 0.01)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh"])
def test_gradcheck(backend, activation, residual):
    """First and second derivatives; with a residual and relu, the second one starts from the bit mask."""
    for layout, groups in zip(LAYOUTS, (2, 4), strict=True):
        tensors = [to_layout(t, layout).requires_grad_() for t in inputs(residual=residual, device=backend.device)]

        def function(*args, groups=groups):
            return ours(*args, groups=groups, activation=activation)

        assert gradcheck(function, tensors, fast_mode=backend.small)
        assert gradgradcheck(function, tensors, fast_mode=True)


def test_gradcheck_forward_mode_and_batched():
    tensors = [t.requires_grad_() for t in inputs((2, 4, 2, 2))]
    assert gradcheck(ours, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(ours, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_torch_func(activation):
    x, w, b, r = inputs()
    xs, ws = torch.randn(4, *x.shape).double(), torch.rand(4, 4).double()

    def both(transform):
        """Applies it to fastnorm's function and to torch's."""
        results = [transform(lambda *a, f=f: f(*a, activation=activation)) for f in (ours, theirs)]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    def loss(f):
        return lambda *a: f(*a).square().sum()

    both(lambda f: grad(loss(f), argnums=(0, 1, 2, 3))(x, w, b, r))
    both(lambda f: grad(lambda x: grad(loss(f))(x, w, b, r).square().sum())(x))
    both(lambda f: jvp(f, (x, w, b, r), (r, b, w, x)))
    both(lambda f: jvp(lambda x: grad(loss(f))(x, w, b, r), (x,), (r,)))
    both(lambda f: jacrev(lambda x: f(x, w, b, r))(x))
    both(lambda f: jacfwd(lambda w: f(x, w, b, r))(w))
    both(lambda f: vmap(lambda x: f(x, w, b, r))(xs))
    both(lambda f: vmap(lambda x, w: f(x, w, b, r), in_dims=(2, 0), out_dims=1)(xs.movedim(0, 2), ws))
    both(lambda f: vmap(lambda w: f(x, w, b, r))(ws))
    both(lambda f: vmap(grad(loss(f), argnums=(0, 1, 2)), in_dims=(0, None, None, None))(xs, w, b, r))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (0, 4, 3, 2)])
def test_of_nothing(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for f in (fastnorm.GroupNorm(2, 4).double(), *([fastnorm.InstanceNorm1d(4).double()] if len(shape) == 3 else [])):
        (dx,) = torch.autograd.grad(f(x), x, torch.randn_like(x, requires_grad=True), create_graph=True)
        assert torch.autograd.grad(dx, x, torch.randn_like(dx))[0].shape == shape
        assert torch.func.jvp(f, (x.detach(),), (x.detach(),))[1].shape == shape


def test_dual_numbers():
    x, w, b, r = inputs()
    tangents = []
    for f in (ours, theirs):
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, r), forward_ad.make_dual(w, b), b, r)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_running_statistics_once(reentrant):
    results = []
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    for wrapped in (True, False):
        norm = fastnorm.InstanceNorm2d(4, affine=True, track_running_stats=True, activation="relu")
        y = checkpoint(norm, x, use_reentrant=reentrant) if wrapped else norm(x)
        y.square().sum().backward()
        results.append((x.grad, dict(norm.state_dict())))
        x.grad = None
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_has_torchs_dtypes(input_dtype):
    x = torch.randn(4, 6, 5, 5).to(input_dtype).requires_grad_()
    kinds = []
    for norms in (fastnorm, nn):
        with torch.autocast("cpu", torch.bfloat16):
            y, z = norms.GroupNorm(3, 6)(x), norms.InstanceNorm2d(6)(x)
        (dx,) = torch.autograd.grad((y.float() + z.float()).sum(), x)
        kinds.append((y.dtype, z.dtype, dx.dtype))
    assert kinds[0] == kinds[1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.first = fastnorm.GroupNorm(3, 6, activation="silu")
        self.second = fastnorm.InstanceNorm2d(6, affine=True, track_running_stats=True)

    def forward(self, x):
        x = self.conv(x)
        return self.second(self.first(x, x)).square().sum(dim=(2, 3))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_in_one_graph(dynamic, layout):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block()
    other = Block()
    other.load_state_dict(block.state_dict())
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n, height in [(4, 8), (5, 8), (6, 9)] if dynamic else [(4, 8)]:
        image = to_layout(torch.randn(n, 3, height, 8), layout)
        y, z = compiled(image), other(image)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
        y.square().mean().backward(), z.square().mean().backward()
    for p, q in zip(block.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dict(block.state_dict()), dict(other.state_dict()))


def test_inductor():
    torch._dynamo.reset()
    x = torch.randn(3, 6, 5, 5, requires_grad=True)

    def function(x):
        return group_norm(x * 2, 3, activation="silu").sin() + instance_norm(x, activation="relu", residual=x)

    compiled = torch.compile(function, fullgraph=True)
    y, z = compiled(x), function(x)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, z)), rtol=1e-4, atol=1e-4)


def test_export():
    model = nn.Sequential(fastnorm.GroupNorm(3, 6, activation="relu"), fastnorm.InstanceNorm2d(6))
    x = torch.randn(4, 6, 5, 5)
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: n},))
    larger = torch.randn(7, 6, 5, 5)
    torch.testing.assert_close(program.module()(larger), model(larger))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, residual, dy = (to_layout(torch.randn(3, 6, 4, 5), layout) for _ in range(3))
    weight, bias = torch.rand(6), torch.randn(6)
    for activation, save_mask in (("silu", False), ("relu", True)):
        config = (3, 1e-5, activation, 0.01)
        forward = (x, residual, weight, bias, *config, save_mask)
        _, stats, mask = torch.ops.fastnorm.group_norm_forward(*forward)
        torch.library.opcheck(torch.ops.fastnorm.group_norm_forward.default, forward)
        backward = (dy, x, residual, weight, bias, stats, mask if save_mask else None, *config, [True] * 4)
        torch.library.opcheck(torch.ops.fastnorm.group_norm_backward.default, backward)
