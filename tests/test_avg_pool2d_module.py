"""AvgPool2d as a drop-in module, and the errors: those of torch."""

import pytest
import torch
import torch.nn.functional as F
from pools import ERRORS, Recorder, check_error, copies, x
from torch import nn

import fastnorm
from fastnorm.functional import avg_pool2d

ARGUMENTS = [
    ((2,), {}),
    ((3, 2, 1), {"count_include_pad": False}),
    (((3, 2),), {"stride": (2, 1), "ceil_mode": True, "divisor_override": 5}),
]


@pytest.mark.parametrize("arguments, keywords", ARGUMENTS)
def test_avg_pool_is_torchs(backend, arguments, keywords):
    ours, theirs = (package.AvgPool2d(*arguments, **keywords) for package in (fastnorm, nn))
    assert isinstance(ours, nn.AvgPool2d) and repr(ours) == repr(theirs) and ours.state_dict() == {}
    x = torch.randn(2, 3, 9, 9, device=backend.device)
    for module in copies(ours):
        assert repr(module) == repr(theirs)
        torch.testing.assert_close(module(x), theirs(x))


def test_attributes_may_change():
    pool = fastnorm.AvgPool2d(2)
    x = torch.randn(1, 2, 8, 8)
    pool.kernel_size = pool.stride = [3, 3]
    pool.divisor_override = 4
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, 3, divisor_override=4))


def test_symbolic_trace():
    traced = torch.fx.symbolic_trace(nn.Sequential(fastnorm.AvgPool2d(2)))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0"]


def test_convert_and_fuse():
    """The models' import takes ours, and what follows a pooling is fused as after torch's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    before = model.eval()(x)
    assert [r.after for r in fastnorm.convert(model).replaced][1] == "fastnorm.AvgPool2d"
    torch.testing.assert_close(model(x), before)
    fastnorm.revert(model)
    assert type(model[1]) is nn.AvgPool2d
    fused = fastnorm.fuse(model, save_memory=True)
    assert type(fused[1]) is fastnorm.AvgPool2d and len(fused.fuse_report.fused) == 1
    torch.testing.assert_close(fused(x), before)
    assert isinstance(fastnorm.models.lenet_sequential()[2], fastnorm.AvgPool2d)


def test_tensor_subclasses():
    x = torch.randn(1, 2, 8, 8).as_subclass(Recorder)
    for call in (avg_pool2d, lambda x, k: fastnorm.AvgPool2d(k)(x)):
        Recorder.called.clear()
        y = call(x, 2)
        assert type(y) is Recorder and Recorder.called[0] in (avg_pool2d, fastnorm.AvgPool2d.forward)


def test_a_parameter_is_pooled():
    x = nn.Parameter(torch.randn(1, 2, 4, 4))
    fastnorm.AvgPool2d(2)(x).sum().backward()
    assert x.grad.sum() == 8


@pytest.mark.parametrize(
    "kind, message, call",
    [
        *ERRORS,
        (RuntimeError, "3D or 4D (batch mode) tensor", lambda f: f(x[None], 2)),
        (RuntimeError, "divisor must be not zero", lambda f: f(x, 2, divisor_override=0)),
        (TypeError, "divisor_override", lambda f: f(x, 2, divisor_override=2.5)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_are_torchs(kind, message, call):
    check_error((avg_pool2d, F.avg_pool2d), kind, message, call)


@pytest.mark.parametrize(
    "call", [lambda f: f(x, 2**33), lambda f: f(x, (2, 2.5)), lambda f: f(x[0, 0], 2)], ids=["large", "float", "2-D"]
)
def test_other_errors_have_torchs_class(call):
    classes = []
    for function in (avg_pool2d, F.avg_pool2d):
        with pytest.raises(Exception) as raised:
            call(function)
        classes.append(raised.type)
    assert issubclass(*classes)


def test_the_operators_check_what_they_are_given():
    backward, dy = torch.ops.fastnorm.avg_pool2d_backward, torch.ones(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match="an input of size 5 has not as many as 4 windows"):
        backward(dy, 5, 8, [2], [2], [0], False, True, None, False)
    with pytest.raises(RuntimeError, match="channels_last needs 4 dimensions"):
        backward(dy[0], 8, 8, [2], [2], [0], False, True, None, True)
