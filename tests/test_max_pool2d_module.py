"""MaxPool2d and MaxUnpool2d as drop-in modules: repr, copies, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F
from pools import ERRORS, Recorder, check_error, copies, x
from torch import nn

import fastnorm
from fastnorm.functional import max_pool2d

ARGUMENTS = [
    ((2,), {}),
    ((3, 2, 1), {"return_indices": True}),
    (((3, 2),), {"stride": (2, 1), "dilation": 2, "ceil_mode": True}),
]


@pytest.mark.parametrize("arguments, keywords", ARGUMENTS)
def test_max_pool_is_torchs(backend, arguments, keywords):
    ours, theirs = (package.MaxPool2d(*arguments, **keywords) for package in (fastnorm, nn))
    assert isinstance(ours, nn.MaxPool2d) and repr(ours) == repr(theirs) and ours.state_dict() == {}
    x = torch.randn(2, 3, 9, 9, device=backend.device)
    for module in copies(ours):
        assert repr(module) == repr(theirs)
        for a, b in zip(torch.utils._pytree.tree_leaves(module(x)), torch.utils._pytree.tree_leaves(theirs(x)),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)


def test_max_unpool_is_torchs(backend):
    ours, theirs = (package.MaxUnpool2d((3, 2), stride=2) for package in (fastnorm, nn))
    assert isinstance(ours, nn.MaxUnpool2d) and repr(ours) == repr(theirs)
    y, indices = F.max_pool2d(torch.randn(2, 3, 9, 8), (3, 2), 2, return_indices=True)
    y, indices = y.to(backend.device), indices.to(backend.device)
    for module in copies(ours):
        assert repr(module) == repr(theirs)
        assert module(y, indices).shape == theirs(y, indices).shape
        assert module(y, indices, output_size=(9, 8)).shape == theirs(y, indices, output_size=(9, 8)).shape


def test_attributes_may_change():
    pool = fastnorm.MaxPool2d(2)
    x = torch.randn(1, 2, 8, 8)
    pool.kernel_size = pool.stride = [3, 3]
    pool.return_indices = True
    assert torch.equal(pool(x)[0], F.max_pool2d(x, 3))


def test_symbolic_trace():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.unpool = fastnorm.MaxPool2d(2, return_indices=True), fastnorm.MaxUnpool2d(2)

        def forward(self, x):
            y, indices = self.pool(x)[0], self.pool(x)[1]
            return self.unpool(y, indices, (8, 8)) + self.unpool(y, indices)

    traced = torch.fx.symbolic_trace(Both())
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["pool", "pool", "unpool", "unpool"]
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(traced(x), Both()(x))


def test_tensor_subclasses():
    x = torch.randn(1, 2, 8, 8).as_subclass(Recorder)
    for call in (max_pool2d, lambda x, k: fastnorm.MaxPool2d(k)(x)):
        Recorder.called.clear()
        y = call(x, 2)
        assert type(y) is Recorder and torch.equal(y, F.max_pool2d(x, 2))
        assert Recorder.called[0] in (max_pool2d, fastnorm.MaxPool2d.forward)


def test_a_parameter_is_pooled():
    x = nn.Parameter(torch.randn(1, 2, 4, 4))
    fastnorm.MaxPool2d(2)(x).sum().backward()
    assert x.grad.sum() == 8


@pytest.mark.parametrize(
    "kind, message, call",
    [
        *ERRORS,
        (RuntimeError, "dilation should be greater than zero", lambda f: f(x, 2, dilation=0)),
        (RuntimeError, "pad should be smaller than or equal to half of", lambda f: f(x, 3, 1, padding=2, dilation=2)),
        (RuntimeError, "3D or 4D (batch mode) tensor expected", lambda f: f(x[0, 0], 2)),
        (RuntimeError, "dilation must be either a single int", lambda f: f(x, 2, dilation=(1, 1, 1))),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_are_torchs(kind, message, call):
    check_error((max_pool2d, F.max_pool2d), kind, message, call)


@pytest.mark.parametrize(
    "call",
    [lambda f: f(x, 2**33), lambda f: f(x, (2, 2.5)), lambda f: f(None, 2)],
    ids=["too large", "not an int", "no tensor"],
)
def test_error_classes_are_torchs(call):
    classes = []
    for function in (max_pool2d, F.max_pool2d):
        with pytest.raises(Exception) as raised:
            call(function)
        classes.append(raised.type)
    assert classes[0] is classes[1] or issubclass(classes[0], (TypeError, AttributeError))


def test_the_operators_check_what_they_are_given():
    backward = torch.ops.fastnorm.max_pool2d_backward
    dy, offset = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="offset must be what the forward operator returned"):
        backward(dy, offset.int(), 8, 8, [2], [2], [0], [1], False)
    with pytest.raises(RuntimeError, match="an input of size 5 has not as many as 4 windows"):
        backward(dy, offset, 5, 8, [2], [2], [0], [1], False)
