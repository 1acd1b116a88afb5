"""Derivatives of every kind: gradcheck, double backward, forward mode, torch.func, checkpointing, autocast."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, to_layout
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.activation import activate
from fastnorm.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
RUNNING = torch.linspace(-1, 1, 3, dtype=torch.float64), torch.linspace(0.5, 2, 3, dtype=torch.float64)


def inputs(shape=(3, 3, 2, 2), residual=True, device="cpu"):
    tensors = [torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    tensors += [torch.randn(shape)] if residual else []
    return [t.to(device, torch.float64) for t in tensors]


def ours(x, w, b, r=None, *, activation="silu", training=True):
    mean, var = (None, None) if training else (t.to(x.device) for t in RUNNING)
    return batch_norm(x, mean, var, w, b, training, activation=activation, residual=r)


def theirs(x, w, b, r=None, *, activation="silu", training=True):
    mean, var = (None, None) if training else RUNNING
    z = F.batch_norm(x, mean, var, w, b, training)
    return activate(z if r is None else z + r, activation, 0.01)


@MODES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu_tanh"])
def test_gradcheck(backend, activation, residual, training):
    """First and second derivatives; with a residual and relu, the second one starts from the bit mask."""
    for layout in LAYOUTS:
        tensors = [to_layout(t, layout).requires_grad_() for t in inputs(residual=residual, device=backend.device)]

        def function(*args):
            return ours(*args, activation=activation, training=training)

        assert gradcheck(function, tensors, fast_mode=backend.small)
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_derivatives_with_another_negative_slope(residual):
    tensors = [t.requires_grad_() for t in inputs(residual=residual)]

    def function(x, w, b, r=None):
        return batch_norm(x, None, None, w, b, True, activation="leaky_relu", residual=r, negative_slope=0.4)

    assert gradcheck(function, tensors, check_forward_ad=True) and gradgradcheck(function, tensors)


@MODES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradcheck_forward_mode_and_batched(activation, training):
    tensors = [t.requires_grad_() for t in inputs()]

    def function(*args):
        return ours(*args, activation=activation, training=training)

    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@MODES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_torch_func(activation, training):
    x, w, b, r = inputs()
    xs, ws = torch.randn(4, *x.shape).double(), torch.rand(4, 3).double()

    def both(transform):
        """Applies it to fastnorm's function and to torch's."""
        results = []
        for f in (ours, theirs):
            results.append(transform(lambda *a, f=f: f(*a, activation=activation, training=training)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    def loss(f):
        return lambda *a: f(*a).square().sum()

    both(lambda f: grad(loss(f), argnums=(0, 1, 2, 3))(x, w, b, r))
    both(lambda f: grad(lambda x: grad(loss(f))(x, w, b, r).square().sum())(x))
    both(lambda f: jvp(f, (x, w, b, r), (r, b, w, x)))
    both(lambda f: jvp(lambda x: grad(loss(f))(x, w, b, r), (x,), (r,)))
    both(lambda f: jacrev(lambda x: f(x, w, b, r))(x))
    both(lambda f: jacfwd(lambda w: f(x, w, b, r))(w))
    both(lambda f: hessian(lambda w: loss(f)(x, w, b, r))(w))
    both(lambda f: vmap(lambda x: f(x, w, b, r))(xs))
    both(lambda f: vmap(lambda x, w: f(x, w, b, r), in_dims=(2, 0), out_dims=1)(xs.movedim(0, 2), ws))
    both(lambda f: vmap(lambda w: f(x, w, b, r))(ws))
    both(lambda f: vmap(vmap(lambda x: f(x, w, b, r)))(torch.stack([xs, -xs])))
    both(lambda f: vmap(grad(loss(f), argnums=(0, 1, 2)), in_dims=(0, None, None, None))(xs, w, b, r))
    both(lambda f: grad(lambda xs: vmap(lambda x: loss(f)(x, w, b, r))(xs).sum())(xs))


def test_vmap_updates_every_functions_running_statistics():
    xs = torch.randn(4, 3, 3, 2, 2)
    results = []
    # torch's own forgets to write where the batch is not the first dimension of the statistics.
    for f, dim in ((batch_norm, 0), (batch_norm, 1), (F.batch_norm, 0)):
        mean, var = (t if dim == 0 else t.T.contiguous() for t in (torch.zeros(4, 3), torch.ones(4, 3)))
        y = vmap(lambda x, m, v, f=f: f(x, m, v, None, None, True, 0.3), in_dims=(0, dim, dim))(xs, mean, var)
        results.append((y, mean.movedim(dim, 0), var.movedim(dim, 0)))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[0], results[1])
    with pytest.raises(RuntimeError, match="batch_norm: running_mean and running_var must be vmapped over too"):
        vmap(lambda x: batch_norm(x, torch.zeros(3), torch.ones(3), training=True))(xs)


def test_model_ensembling():
    torch.manual_seed(1)
    models = [fastnorm.BatchNorm2d(3, activation="relu") for _ in range(4)]
    xs = torch.randn(4, 5, 3, 2, 2)
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, xs)
    torch.testing.assert_close(y, torch.stack([m(x) for m, x in zip(models, xs, strict=True)]))
    for name, stacked in buffers.items():
        torch.testing.assert_close(stacked, torch.stack([m.get_buffer(name) for m in models]))


@MODES
def test_dual_numbers(training):
    x, w, b, r = inputs()
    tangents = []
    for f in (ours, theirs):
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, r), forward_ad.make_dual(w, b), b, r, training=training)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(backend, reentrant):
    x, _, _, r = (t.float().requires_grad_() for t in inputs(device=backend.device))
    results = []
    for wrapped in (True, False):
        norm = fastnorm.BatchNorm2d(3, activation="relu").to(backend.device)
        y = checkpoint(norm, x, r, use_reentrant=reentrant) if wrapped else norm(x, r)
        gradients = torch.autograd.grad(y.square().sum(), [x, r]) if not reentrant else ()
        if reentrant:
            y.square().sum().backward()
            gradients, x.grad, r.grad = (x.grad, r.grad), None, None
        results.append((gradients, dict(norm.state_dict())))
        assert norm.num_batches_tracked == 1
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_has_torchs_dtypes(dtype, input_dtype):
    x = torch.randn(4, 3, 5, 5).to(input_dtype).requires_grad_()
    kinds = []
    for cls in (fastnorm.BatchNorm2d, torch.nn.BatchNorm2d):
        norm = cls(3)
        with torch.autocast("cpu", dtype):
            y = norm(torch.nn.functional.conv2d(x, torch.ones(3, 3, 1, 1)))
            z = norm(x)
        (dx,) = torch.autograd.grad((y.float() + z.float()).sum(), x)
        kinds.append((y.dtype, z.dtype, dx.dtype, norm.running_mean.dtype))
    assert kinds[0] == kinds[1]


def test_saved_tensors_hooks_see_what_is_kept():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = batch_norm(x, None, None, training=True, activation="relu", residual=x.detach())
    z = F.batch_norm(x, None, None, training=True).add(x.detach()).relu()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), x))


def test_the_operators_alone_record_gradients():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y, stats, _ = torch.ops.fastnorm.batch_norm_forward(
        x, None, None, None, None, None, None, True, 0.1, 1e-5, "none", 0.01, False
    )
    assert y.requires_grad and not stats.requires_grad and y.grad_fn.name() == "BatchNormBackward"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.ops.fastnorm.batch_norm_forward(
            forward_ad.make_dual(x, x), None, None, None, None, None, None, True, 0.1, 1e-5, "none", 0.01, False
        )
