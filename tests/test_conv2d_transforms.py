"""Convolution under torch.compile, autocast, torch.func, double differentiation and saved-tensor hooks."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from oracle import error

import fastnorm
from fastnorm.functional import conv2d


def arguments(device="cpu", dtype=torch.float64):
    shapes = ((2, 4, 6, 5), (6, 2, 3, 2), (6,))
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


WINDOW = ((2, 1), (1, 1), (1, 2), 2)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "gelu"])
@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_gradcheck(backend, activation, algorithm):
    def function(*tensors):
        return conv2d(*tensors, *WINDOW, activation=activation, algorithm=algorithm)

    inputs = arguments(backend.device)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (0, 0, 0), (1, None, 0), (None, 2, None)])
def test_vmap(backend, in_dims):
    batch = 3
    tensors = [t.detach() for t in arguments(backend.device)]
    tensors = [
        t if d is None else torch.stack([t * (i + 1) for i in range(batch)], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]

    def gradient(function):
        return torch.func.grad(lambda *a: function(*a, *WINDOW).sin().sum(), (0, 1, 2))

    for ours, theirs in (
        (lambda *a: conv2d(*a, *WINDOW, activation="relu"), lambda *a: F.conv2d(*a, *WINDOW).relu()),
        (gradient(conv2d), gradient(F.conv2d)),
    ):
        results = [torch.func.vmap(f, in_dims)(*tensors) for f in (ours, theirs)]
        for a, b in zip(*(torch.utils._pytree.tree_leaves(r) for r in results), strict=True):
            assert error(a, b) < 1e-12


def test_backward_operator_under_vmap(backend):
    x, weight, _ = (t.detach() for t in arguments(backend.device))
    dys = torch.randn(3, *F.conv2d(x, weight, None, *WINDOW).shape, dtype=x.dtype, device=x.device)

    def gradients(function):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*leaves, None, *WINDOW)
        return torch.autograd.grad(y, leaves, dys, is_grads_batched=True)

    for a, b in zip(gradients(conv2d), gradients(F.conv2d), strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(layout):
    model = torch.nn.Sequential(
        fastnorm.Conv2d(3, 6, 3, padding="same", activation="relu"), fastnorm.Conv2d(6, 4, 1, activation="silu")
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8, 9), (3, 3, 10, 12)):
        x = to_layout(torch.randn(shape), layout)
        results = []
        for m in (model, compiled):
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in m.parameters())])
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-5
    exported = torch.export.export(model, (x,))
    assert error(exported.module()(x), model(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    inputs = arguments(backend.device, torch.float32)
    with torch.autocast(backend.device, dtype):
        y, z = conv2d(*inputs, *WINDOW), F.conv2d(*inputs, *WINDOW)
        assert y.dtype == z.dtype == dtype
        assert (
            conv2d(*(t.double() for t in inputs), *WINDOW).dtype
            == F.conv2d(*(t.double() for t in inputs), *WINDOW).dtype
        )
    assert error(y, z) < 0.02
    for t in torch.autograd.grad(y.float().sum(), inputs):
        assert t.dtype == torch.float32


def test_what_backward_keeps():
    """Input and weight, and for an activation that its result tells the slope of, the result."""
    x, weight, bias = arguments(dtype=torch.float32)
    for activation, kept in ((None, {"x", "weight"}), ("relu", {"x", "weight", "y"}), ("tanh", {"x", "weight", "y"})):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            y = conv2d(x, weight, bias, *WINDOW, activation=activation)
        names = {x.data_ptr(): "x", weight.data_ptr(): "weight", y.data_ptr(): "y"}
        assert {names[p] for p in saved} == kept


def test_backward_twice_is_refused():
    x, weight, bias = arguments()
    y = conv2d(x, weight, bias, *WINDOW)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_arguments_changed_in_place_are_noticed():
    x, weight, bias = arguments()
    for change in (x, weight):
        y = conv2d(x, weight, bias, *WINDOW)
        with torch.no_grad():
            change.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_tensor_subclasses_see_the_function():
    names = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1, 2, 5, 5).as_subclass(Seen)
    conv2d(x, torch.randn(3, 2, 3, 3))
    assert "conv2d" in names
