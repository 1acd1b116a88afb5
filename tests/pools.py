"""What the poolings' tests share: views, wrong windows, torch.func's transforms, whole graphs."""

import copy
import pickle

import pytest
import torch
from conftest import to_layout
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint


class Recorder(torch.Tensor):
    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def views(device):
    """Images of several strides and alignments."""
    base = torch.randn(2, 9, 11, 18, device=device)
    return {
        "offset": base.flatten()[1 : 1 + 2 * 4 * 10 * 16].view(2, 4, 10, 16),
        "sliced": base[:, ::2, 1:9, 2:18],
        "transposed": base.transpose(2, 3),
        "flipped layout": base.permute(0, 2, 3, 1)[:, :8],
        "channels_last slice": base.contiguous(memory_format=torch.channels_last)[:, :8],
        "expanded": base[:1, :1].expand(3, 2, -1, -1),
    }


def copies(module):
    return module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))


x = torch.ones(2, 3, 8, 8)

# Of every pooling f: the error's class, a part of its message, and the call.
ERRORS = [
    (RuntimeError, "stride should not be zero", lambda f: f(x, 0)),
    (RuntimeError, "stride should not be zero", lambda f: f(x, 2, 0)),
    (RuntimeError, "stride should be greater than zero", lambda f: f(x, 2, -1)),
    (RuntimeError, "kernel size should be greater than zero", lambda f: f(x, -1, 1)),
    (RuntimeError, "pad should be at most half of effective kernel size", lambda f: f(x, 2, padding=2)),
    (RuntimeError, "pad must be non-negative", lambda f: f(x, 2, padding=-1)),
    (RuntimeError, "Output size is too small", lambda f: f(x, 9)),
    (RuntimeError, "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch", lambda f: f(x[:, :0], 2)),
    (RuntimeError, "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch", lambda f: f(x[:, :, :0], 2)),
    (RuntimeError, "kernel_size must either be a single int", lambda f: f(x, (2, 2, 2))),
    (RuntimeError, "kernel_size must either be a single int", lambda f: f(x, ())),
    (RuntimeError, "stride must either be omitted", lambda f: f(x, 2, (1, 1, 1))),
    (RuntimeError, "padding must either be a single int", lambda f: f(x, 2, padding=(1, 1, 1))),
    (TypeError, "kernel_size", lambda f: f(x, 2.5)),
    (TypeError, "kernel_size", lambda f: f(x, True)),
    (TypeError, "kernel_size", lambda f: f(x, None)),
    (TypeError, "stride", lambda f: f(x, 2, "a")),
    (NotImplementedError, "not implemented for 'Bool'", lambda f: f(x.bool(), 2)),
]


def check_error(functions, kind, message, call):
    for function in functions:
        with pytest.raises(kind) as raised:
            call(function)
        assert message in str(raised.value)


def check_torch_func(functions, x, v, xs):
    """Every transform of fastnorm's function and of torch's, at x of (N, C, H, W), with a v like it and a batch xs."""

    def both(transform):
        torch.testing.assert_close(*(transform(f) for f in functions))

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


def check_checkpointing(functions, reentrant, **tolerance):
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for function in functions:
        leaf = x.clone().requires_grad_()
        checkpoint(function, leaf, use_reentrant=reentrant).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, **tolerance)


def check_one_graph(ours, theirs, layout, dynamic):
    """A network of (N, 3, H, 8) compiled whole, against torch's as it is."""
    torch._dynamo.reset()
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n, height in [(4, 8), (5, 8), (6, 12)] if dynamic else [(4, 8)]:
        x = to_layout(torch.randn(n, 3, height, 8), layout)
        y, z = compiled(x), theirs(x)
        torch.testing.assert_close(y, z)
        y.sum().backward(), z.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def check_inductor(function):
    torch._dynamo.reset()
    x = torch.randn(3, 6, 8, 8, requires_grad=True)
    y, z = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, z)))


def check_export(model):
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: n},))
    larger = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(larger), model(larger))
