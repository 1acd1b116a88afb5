"""Layer norm's sum, LayerNorm2d and RMSNorm: derivatives of every kind, torch.func, torch.compile, export, autocast."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.activation import activate
from fastnorm.functional import add_layer_norm, add_rms_norm

SUMS = pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])


def summed(rms, activation="silu"):
    """fastnorm's function of x, residual, weight, and torch's."""
    ours = add_rms_norm if rms else add_layer_norm

    def theirs(x, residual, weight):
        h = x + residual
        z = F.rms_norm(h, weight.shape, weight, 1e-5) if rms else F.layer_norm(h, weight.shape, weight, None, 1e-5)
        return activate(z, activation, 0.01), h

    return lambda x, r, w: ours(x, r, w.shape, w, eps=1e-5, activation=activation), theirs


def channels_norm(activation="silu"):
    norm = fastnorm.LayerNorm2d(4, activation=activation)

    def ours(x, w, b, r=None):
        return torch.func.functional_call(norm, {"weight": w, "bias": b}, (x, r))

    def theirs(x, w, b, r=None):
        z = F.layer_norm(x.movedim(1, -1), (4,), w, b).movedim(-1, 1)
        return activate(z if r is None else z + r, activation, 0.01)

    return ours, theirs


@SUMS
def test_sum(backend, rms):
    ours, theirs = summed(rms)
    x, residual = torch.randn(2, 5, 9, device=backend.device).requires_grad_().unbind()
    weight = torch.rand(9, device=backend.device, requires_grad=True)
    y, h = ours(x, residual, weight)
    y2, h2 = theirs(x, residual, weight)
    assert torch.equal(h, h2)
    torch.testing.assert_close(y, y2)
    # Of both results, of one, and of the other.
    for of in (lambda y, h: (y * h.sin()).sum(), lambda y, h: y.square().sum(), lambda y, h: h.square().sum()):
        grads = [
            torch.autograd.grad(of(*t), (x, residual, weight), retain_graph=True, allow_unused=True)
            for t in ((y, h), (y2, h2))
        ]
        torch.testing.assert_close(*[[torch.zeros(()) if g is None else g for g in gs] for gs in grads])
    (only,) = torch.autograd.grad(ours(x.detach(), residual, weight)[0].square().sum(), residual)
    torch.testing.assert_close(only, torch.autograd.grad(y2.square().sum(), residual)[0])


@SUMS
def test_sum_in_16_bits_normalises_what_it_returns(backend, rms):
    ours, theirs = summed(rms)
    x, residual = (torch.randn(5, 9, device=backend.device) * 100).bfloat16(), torch.randn(5, 9).bfloat16()
    residual = residual.to(backend.device)
    y, h = ours(x, residual, torch.ones(9, dtype=torch.bfloat16, device=backend.device))
    exact = theirs(h.double(), torch.zeros_like(h).double(), torch.ones(9, device=backend.device).double())[0]
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(y.double(), exact, rtol=8e-3, atol=8e-3)


@SUMS
def test_sum_gradcheck(backend, rms):
    ours, _ = summed(rms, "gelu")
    x, residual = torch.randn(2, 3, 5, dtype=torch.float64, device=backend.device)
    tensors = [x, residual, torch.rand(5, dtype=torch.float64, device=backend.device)]
    tensors = [t.requires_grad_() for t in tensors]
    assert gradcheck(ours, tensors, fast_mode=True)
    assert gradgradcheck(ours, tensors, fast_mode=True)


@SUMS
def test_sum_under_transforms(rms):
    ours, theirs = summed(rms)
    xs, rs = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    w = torch.rand(5, dtype=torch.float64)

    def both(transform):
        torch.testing.assert_close(*(transform(f) for f in (ours, theirs)), rtol=1e-9, atol=1e-9)

    def loss(f):
        return lambda *a: sum(t.square().sum() for t in f(*a))

    both(lambda f: vmap(f, (0, 0, None))(xs, rs, w))
    both(lambda f: vmap(f, (0, None, None))(xs, rs[0], w))
    both(lambda f: jvp(f, (xs, rs, w), (rs, xs, w)))
    both(lambda f: vmap(grad(loss(f), argnums=(0, 1, 2)), (0, 0, None))(xs, rs, w))
    both(lambda f: grad(lambda x: grad(loss(f))(x, rs, w).square().sum())(xs))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_channels_under_transforms(activation):
    ours, theirs = channels_norm(activation)
    x, r = torch.randn(2, 3, 4, 2, 3, dtype=torch.float64)
    w, b = torch.rand(2, 4, dtype=torch.float64)
    xs, ws = torch.randn(5, *x.shape, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)

    def both(transform):
        torch.testing.assert_close(*(transform(f) for f in (ours, theirs)), rtol=1e-9, atol=1e-9)

    def loss(f):
        return lambda *a: f(*a).square().sum()

    both(lambda f: vmap(lambda t: f(t, w, b, r))(xs))
    both(lambda f: vmap(lambda t, w: f(t, w, b), (2, 0))(xs.movedim(0, 2), ws))
    both(lambda f: vmap(lambda w: f(x, w, b))(ws))
    both(lambda f: jvp(f, (x, w, b, r), (r, b, w, x)))
    both(lambda f: vmap(grad(loss(f), argnums=(0, 1, 2)), (0, None, None))(xs, w, b))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, r), w, b)).tangent for f in (ours, theirs)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_gradcheck(backend, layout, residual):
    """With a residual and relu the second derivative starts from the bit mask."""
    ours, _ = channels_norm("relu")
    x, r = (to_layout(t, layout) for t in torch.randn(2, 2, 4, 2, 3, dtype=torch.float64, device=backend.device))
    w, b = torch.rand(2, 4, dtype=torch.float64, device=backend.device)
    tensors = [t.requires_grad_() for t in ((x, w, b, r) if residual else (x, w, b))]
    assert gradcheck(ours, tensors, fast_mode=True)
    assert gradgradcheck(ours, tensors, fast_mode=True)


class Block(nn.Module):
    """Of a ConvNeXt and a pre-norm transformer at once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.channels = fastnorm.LayerNorm2d(6, activation="gelu")
        self.linear = nn.Linear(6, 6)
        self.norm = fastnorm.LayerNorm(6)
        self.rms = fastnorm.RMSNorm(6)

    def forward(self, x):
        x = self.channels(self.conv(x)).flatten(2).mT
        y, h = add_layer_norm(self.linear(x), x, (6,), self.norm.weight, self.norm.bias)
        return self.rms(y, h)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_in_one_graph(dynamic, layout):
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n, height in [(4, 8), (5, 8), (6, 9)] if dynamic else [(4, 8)]:
        image = to_layout(torch.randn(n, 3, height, 8), layout)
        y, z = compiled(image), block(image)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(t.square().mean(), list(block.parameters())) for t in (y, z)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_inductor_and_transforms_in_a_graph():
    torch._dynamo.reset()
    x, w = torch.randn(3, 4, 6), torch.rand(6)

    def function(x, w):
        y, h = add_rms_norm(x * 2, x, (6,), w)
        return vmap(lambda t: fastnorm.functional.layer_norm(t, (6,), w, activation="silu"))(y + h)

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x, w), function(x, w), rtol=1e-4, atol=1e-4)


def test_export():
    model = nn.Sequential(fastnorm.LayerNorm2d(3, activation="relu"), fastnorm.LayerNorm(5), fastnorm.RMSNorm(5))
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: n},))
    larger = torch.randn(7, 3, 5, 5)
    torch.testing.assert_close(program.module()(larger), model(larger))


def test_checkpointing():
    norm, x = fastnorm.LayerNorm(5), torch.randn(4, 5, requires_grad=True)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (checkpoint(norm, x, use_reentrant=False), norm(x))]
    assert torch.equal(*grads)


NORMS = {
    "LayerNorm": (5,), "RMSNorm": (5,), "GroupNorm": (2, 6), "InstanceNorm1d": (6,), "BatchNorm1d": (6,),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_cuda_autocast_has_torchs_dtypes(name):
    """On a GPU torch's autocast runs layer norm and group norm in float32, not the others; shapes alone show it."""
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 6, 5, dtype=torch.bfloat16, device="cuda")
        ours, theirs = (getattr(package, name)(*NORMS[name], device="cuda").eval() for package in (fastnorm, nn))
        torch.set_autocast_enabled("cuda", True)
        try:
            assert ours(x).dtype == theirs(x).dtype
        finally:
            torch.set_autocast_enabled("cuda", before)


class Named(torch.Tensor):
    """A tensor that overrides functions, in that results are of its class."""


@pytest.mark.parametrize("name", [*NORMS, "LayerNorm2d", "SyncBatchNorm"])
def test_subclasses_and_traces(name):
    norm = getattr(fastnorm, name)(*NORMS.get(name, (6,))).eval()
    x = torch.randn(4, 6, 5)
    y = norm(x.as_subclass(Named))
    assert type(y) is Named and torch.equal(y.as_subclass(torch.Tensor), norm(x))
    traced = torch.fx.symbolic_trace(nn.Sequential(norm))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(x), norm(x))
