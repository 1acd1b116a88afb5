"""torch.compile, torch.export, FakeTensor, and the operators' contracts with the dispatcher."""

import pytest
import torch
from conftest import LAYOUTS, to_layout
from torch import nn
from torch._subclasses import FakeTensorMode

import fastnorm
from fastnorm._check import CHECKS
from fastnorm.functional import batch_norm


class Block(nn.Module):
    def __init__(self, activation="relu", **arguments):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.first = fastnorm.BatchNorm2d(6, activation=activation, **arguments)
        self.second = fastnorm.BatchNorm2d(6, **arguments)

    def forward(self, x):
        x = self.conv(x)
        return self.second(self.first(x, x)).sum(dim=(2, 3))


def run_both(backend, dynamic, training, activation="relu", layout="planes", **arguments):
    torch._dynamo.reset()
    blocks = []
    for _ in range(2):
        torch.manual_seed(0)
        blocks.append(Block(activation, **arguments).train(training))
    compiled = torch.compile(blocks[0], backend=backend, fullgraph=True, dynamic=dynamic)
    batches = [(4, 8), (5, 8), (6, 9)] if dynamic else [(4, 8), (4, 8)]
    for n, height in batches:
        x = to_layout(torch.randn(n, 3, height, 8), layout)
        y, z = compiled(x), blocks[1](x)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        z.square().sum().backward()
    # The convolution's bias cancels in the norm: what is left of its gradient is rounding of far larger terms.
    scale = max(p.grad.abs().max().item() for p in blocks[1].parameters())
    for p, q in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * scale)
    torch.testing.assert_close(dict(blocks[0].state_dict()), dict(blocks[1].state_dict()))
    if training and arguments.get("track_running_stats", True):
        assert blocks[0].first.num_batches_tracked == len(batches)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_in_one_graph(dynamic, training):
    run_both("aot_eager", dynamic, training)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_inductor(dynamic):
    run_both("inductor", dynamic, True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"activation": "silu"},
        {"layout": "channels_last"},
    ],
    ids=str,
)
def test_arguments_in_one_graph(arguments):
    run_both("aot_eager", None, True, **arguments)


def test_function_in_one_graph():
    x, w = torch.randn(4, 3, 5, 5), torch.rand(3, requires_grad=True)
    running = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]

    def function(x, mean, var):
        return batch_norm(x, mean, var, w, None, True, 0.3, activation="gelu", residual=x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *running[0]), function(x, *running[1]))
    torch.testing.assert_close(*running)


def test_transforms_in_one_graph():
    def function(x):
        return batch_norm(x, None, None, training=True, activation="silu")

    x = torch.randn(2, 4, 3, 5, 5)
    for transformed in (
        torch.func.grad(lambda x: function(x[0]).square().sum()),
        torch.func.vmap(function),
        lambda x: torch.func.jvp(function, (x[0],), (x[1],)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transformed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", ""])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(training, strict):
    model, same = (nn.Sequential(fastnorm.BatchNorm2d(3, activation="relu")).train(training) for _ in range(2))
    x = torch.randn(4, 3, 5, 5)
    n, height = torch.export.Dim("n", min=2, max=64), torch.export.Dim("height", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: n, 2: height},), strict=strict)
    larger = torch.randn(7, 3, 9, 5)
    torch.testing.assert_close(program.module()(larger), same(larger))
    mutated = set(program.run_decompositions({}).graph_signature.buffers_to_mutate.values())
    assert mutated == ({"0.running_mean", "0.running_var", "0.num_batches_tracked"} if training else set())


def test_fake_tensors():
    with FakeTensorMode():
        norm = fastnorm.BatchNorm2d(3, activation="relu")
        for layout in LAYOUTS:
            x = to_layout(torch.randn(4, 3, 5, 5), layout).requires_grad_()
            y = norm(x, x)
            y.sum().backward()
            assert type(y) is type(x.detach()) and y.stride() == x.stride() and x.grad.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    for operator, arguments in CHECKS["batch_norm"].operators(backend.device, dtype):
        torch.library.opcheck(operator, arguments)


def test_opcheck_with_gradients_and_mask(backend):
    x, residual = (torch.randn(4, 5, 4, 4, device=backend.device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(5, device=backend.device, requires_grad=True) for _ in range(2))
    for activation, layout in (("relu", "planes"), ("leaky_relu", "channels_last"), ("none", "planes")):
        x, residual = (to_layout(t.detach(), layout).requires_grad_() for t in (x, residual))
        mean, var, count = torch.zeros(5), torch.ones(5), torch.zeros((), dtype=torch.long)
        running = tuple(t.to(backend.device) for t in (mean, var, count))
        arguments = (x, residual, w, b, *running, True, None, 1e-5, activation, 0.1)
        torch.library.opcheck(torch.ops.fastnorm.batch_norm_forward.default, (*arguments, False))
        detached = [t.detach() for t in arguments[:4]]
        _, stats, mask = torch.ops.fastnorm.batch_norm_forward(*detached, *arguments[4:], True)
        torch.library.opcheck(
            torch.ops.fastnorm.batch_norm_backward.default,
            (x.detach(), x.detach(), None, *detached[2:], stats, mask, True, 1e-5, activation, 0.1, [True] * 4),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
