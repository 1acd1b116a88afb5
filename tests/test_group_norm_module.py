"""GroupNorm and InstanceNorm1d, 2d and 3d as drop-in modules: state, modes, repr, copies, errors."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import to_layout
from torch import nn

import fastnorm
from fastnorm.functional import group_norm, instance_norm

INSTANCE = {
    "1d": (fastnorm.InstanceNorm1d, nn.InstanceNorm1d, (4, 6, 9)),
    "2d": (fastnorm.InstanceNorm2d, nn.InstanceNorm2d, (4, 6, 5, 3)),
    "3d": (fastnorm.InstanceNorm3d, nn.InstanceNorm3d, (4, 6, 2, 3, 4)),
}
EACH = pytest.mark.parametrize("cls, torch_cls, shape", INSTANCE.values(), ids=INSTANCE)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def outcome(function):
    """The result's shape, or the error's class."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function().shape
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 9), (4, 6, 5, 3), (2, 6, 2, 3, 4)], ids=str)
def test_group_norm_is_torchs(backend, shape):
    for arguments in ({}, {"affine": False}, {"eps": 0.1}):
        ours, theirs = (c(3, 6, **arguments).to(backend.device) for c in (fastnorm.GroupNorm, nn.GroupNorm))
        x = to_layout(torch.randn(shape), "channels_last").to(backend.device)
        close(ours(x), theirs(x))
        assert isinstance(ours, nn.GroupNorm) and repr(ours) == repr(theirs)
        theirs.load_state_dict(ours.state_dict()), ours.load_state_dict(theirs.state_dict())


@EACH
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("track", [False, True])
def test_instance_norm_trains_and_evaluates_as_torchs(backend, cls, torch_cls, shape, momentum, track):
    for affine in (False, True):
        arguments = {"momentum": momentum, "affine": affine, "track_running_stats": track}
        ours, theirs = (c(6, **arguments).to(backend.device) for c in (cls, torch_cls))
        for step, training in enumerate([True, True, False, True, False]):
            x = torch.randn(shape, device=backend.device) * (step + 1) + step
            x = to_layout(x, "channels_last" if step % 2 else "planes")
            close(ours.train(training)(x), theirs.train(training)(x))
            close(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert repr(ours) == repr(theirs) and isinstance(ours, torch_cls)


@EACH
def test_unbatched_input(cls, torch_cls, shape):
    x = torch.randn(shape[1:])
    for track in (False, True):
        ours, theirs = (c(6, track_running_stats=track) for c in (cls, torch_cls))
        close(ours(x), theirs(x))
        close(dict(ours.state_dict()), dict(theirs.state_dict()))
    close(cls(6, activation="relu")(x, x), torch.relu(torch_cls(6)(x) + x))


@pytest.mark.parametrize(
    "make, torch_cls, shape",
    [(lambda **a: fastnorm.GroupNorm(3, 6, **a), lambda: nn.GroupNorm(3, 6), (4, 6, 5))]
    + [(lambda c=c, **a: c(6, **a), lambda t=t: t(6), s) for c, t, s in INSTANCE.values()],
    ids=["group", *INSTANCE],
)
def test_activation_residual_and_copies(make, torch_cls, shape):
    x, residual = torch.randn(2, *shape)
    norm = make(activation="leaky_relu", negative_slope=0.3)
    close(norm(x, residual), nn.functional.leaky_relu(torch_cls()(x) + residual, 0.3))
    assert repr(norm) == repr(torch_cls())[:-1] + ", activation='leaky_relu', negative_slope=0.3)"
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert repr(other) == repr(norm) and torch.equal(other(x), norm(x))


@EACH
def test_errors_and_shapes_are_torchs(cls, torch_cls, shape):
    for dims in [(6,), (6, 3), (2, 6, 3), (2, 6, 3, 3), (2, 6, 2, 2, 2), (2, 6, 1, 1, 1, 2), (2, 5, *shape[2:])]:
        for affine in (False, True):
            ours, theirs = (
                outcome(lambda c=c, a=affine, d=dims: c(6, affine=a)(torch.ones(d))) for c in (cls, torch_cls)
            )
            assert ours == theirs, dims
    one = torch.ones(2, 6, *(1 for _ in shape[2:]))
    with pytest.raises(ValueError, match="more than 1 spatial element when training"):
        cls(6)(one)
    with pytest.raises(ValueError):
        torch_cls(6)(one)


x, v = torch.ones(4, 6, 5, 5), torch.ones(6)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (RuntimeError, "multiple of the number of groups", lambda: group_norm(x, 4)),
        (RuntimeError, "groups must be positive", lambda: group_norm(x, 0)),
        (RuntimeError, "weight must have shape (6,), got (4,)", lambda: group_norm(x, 3, torch.ones(4))),
        (RuntimeError, "bias must have shape (6,), got (4,)", lambda: group_norm(x, 3, None, torch.ones(4))),
        (RuntimeError, "weight and bias must be float32 like", lambda: group_norm(x, 3, v.double(), v.double())),
        (RuntimeError, "residual must have the input's shape", lambda: group_norm(x, 3, residual=x[:1])),
        (RuntimeError, "2 or more dimensions", lambda: group_norm(v, 3)),
        (NotImplementedError, "input must be float64", lambda: group_norm(x.int(), 3)),
        (ValueError, "more than 1 value per channel", lambda: group_norm(x[:1, :, :1, :1], 6)),
        (ValueError, "activation must be", lambda: group_norm(x, 3, activation="swish")),
        (ValueError, "activation must be", lambda: fastnorm.GroupNorm(3, 6, activation="swish")),
        (RuntimeError, "running_mean and running_var must be", lambda: instance_norm(x, use_input_stats=False)),
        (RuntimeError, "running_mean must have shape (6,)", lambda: instance_norm(x, torch.ones(5), v.clone())),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_say_what_is_wrong(kind, message, call):
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind and message in str(raised.value)


def test_meta_device_and_symbolic_trace():
    norm = fastnorm.GroupNorm(3, 6, device="meta", activation="relu")
    assert norm(torch.empty(2, 6, 3, 3, device="meta")).shape == (2, 6, 3, 3)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), fastnorm.GroupNorm(3, 6), fastnorm.InstanceNorm2d(6))
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    image = torch.randn(2, 3, 4, 4)
    close(traced(image), model(image))
