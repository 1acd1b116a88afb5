"""BatchNorm1d, 2d and 3d as drop-in modules: state, modes, repr, pickling, subclassing, errors."""

import copy
import doctest
import inspect
import io
import itertools
import pickle
import re

import pytest
import torch
from conftest import to_layout
from nets import leave_process_group
from torch import nn

import fastnorm

PAIRS = {
    "1d": (fastnorm.BatchNorm1d, nn.BatchNorm1d, (4, 6)),
    "1d sequence": (fastnorm.BatchNorm1d, nn.BatchNorm1d, (4, 6, 9)),
    "2d": (fastnorm.BatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 3)),
    "3d": (fastnorm.BatchNorm3d, nn.BatchNorm3d, (4, 6, 2, 3, 4)),
}
# torch's keyword from version 2.13 on
BIAS = [{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm2d).parameters else []
EACH = pytest.mark.parametrize("cls, torch_cls, shape", PAIRS.values(), ids=PAIRS)


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@EACH
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"track_running_stats": False}, *BIAS], ids=str)
def test_training_then_evaluation(backend, cls, torch_cls, shape, momentum, arguments):
    ours = cls(6, momentum=momentum, **arguments).to(backend.device)
    theirs = torch_cls(6, momentum=momentum, **arguments).to(backend.device)
    for step, training in enumerate([True, True, False, True, False]):
        x = torch.randn(shape, device=backend.device) * (step + 1) + step
        x = to_layout(x, "channels_last" if step % 2 else "planes")
        y, z = ours.train(training)(x), theirs.train(training)(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state(ours), state(theirs), rtol=1e-5, atol=1e-6)


@EACH
def test_activation_and_residual(backend, cls, torch_cls, shape):
    ours, theirs = cls(6, activation="relu").to(backend.device), torch_cls(6).to(backend.device)
    x, residual = torch.randn(2, *shape, device=backend.device)
    torch.testing.assert_close(ours(x, residual), torch.relu(theirs(x) + residual), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, residual=residual), torch.relu(theirs(x) + residual), rtol=1e-5, atol=1e-5)


@EACH
def test_statistics_kept_by_hand(cls, torch_cls, shape):
    """track_running_stats changed after construction, and buffers set to None, as torch documents them."""
    x = torch.randn(shape)
    changes = ({"track_running_stats": False}, {"running_mean": None, "running_var": None})
    for training, change in itertools.product((True, False), changes):
        modules = [c(6).train(training) for c in (cls, torch_cls)]
        for m, (name, value) in itertools.product(modules, change.items()):
            setattr(m, name, value)
        torch.testing.assert_close(modules[0](x), modules[1](x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state(modules[0]), state(modules[1]))


@EACH
def test_subclass_repr_and_state(cls, torch_cls, shape):
    for arguments in (
        {},
        {"affine": False},
        {"momentum": None, "eps": 1e-3},
        *BIAS,
        {"dtype": torch.float64},
    ):
        ours, theirs = cls(6, **arguments), torch_cls(6, **arguments)
        assert isinstance(ours, torch_cls) and repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        ours(torch.randn(shape).to(arguments.get("dtype", torch.float32)))
        assert theirs.load_state_dict(ours.state_dict()) and ours.load_state_dict(theirs.state_dict())
    assert repr(cls(6, activation="relu")) == repr(torch_cls(6))[:-1] + ", activation='relu')"
    assert repr(cls(6, activation="leaky_relu", negative_slope=0.2)).endswith(
        "activation='leaky_relu', negative_slope=0.2)"
    )


def test_positional_arguments_are_torchs():
    ours, theirs = (
        c(6, 1e-3, None, False, False, "cpu", torch.float64) for c in (fastnorm.BatchNorm2d, nn.BatchNorm2d)
    )
    assert repr(ours) == repr(theirs)


def test_old_state_dicts_load():
    """Those from before there was a counter."""
    old = {n: t for n, t in nn.BatchNorm2d(6).state_dict().items() if n != "num_batches_tracked"}
    norm = fastnorm.BatchNorm2d(6)
    norm.load_state_dict(old)
    assert norm.num_batches_tracked == 0


@EACH
def test_copies(cls, torch_cls, shape):
    norm = cls(6, activation="leaky_relu", negative_slope=0.3)
    norm(torch.randn(shape))
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    x = torch.randn(shape)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(norm) and type(other) is type(norm)
        torch.testing.assert_close(state(other), state(norm), rtol=0, atol=0)
        assert torch.equal(other.eval()(x), norm.eval()(x))


def test_hooks_and_conversions():
    norm, seen = fastnorm.BatchNorm2d(6), []
    norm.register_forward_pre_hook(lambda m, args: seen.append("before"))
    norm.register_forward_hook(lambda m, args, y: seen.append("after"))
    norm.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    norm(torch.randn(2, 6, 3, 3, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    norm.half().double().bfloat16()
    assert norm(torch.randn(2, 6, 3, 3).bfloat16()).dtype == torch.bfloat16
    decayed = [n for m in [norm] if not isinstance(m, nn.modules.batchnorm._BatchNorm) for n, _ in m.named_parameters()]
    assert decayed == []


def test_parametrized_weight():
    x, norms = torch.randn(2, 6, 3, 3), (fastnorm.BatchNorm2d(6), nn.BatchNorm2d(6))
    for norm in norms:
        nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
        norm(x).square().sum().backward()
    torch.testing.assert_close(norms[0](x), norms[1](x), rtol=1e-5, atol=1e-5)
    name = "parametrizations.weight.original"
    torch.testing.assert_close(*(n.get_parameter(name).grad for n in norms), rtol=1e-4, atol=1e-4)


def test_meta_device():
    norm = fastnorm.BatchNorm2d(6, device="meta", activation="relu")
    y = norm(torch.empty(2, 6, 3, 3, device="meta"))
    assert y.is_meta and y.shape == (2, 6, 3, 3)
    assert torch.isfinite(norm.to_empty(device="cpu").eval().reset_parameters() or norm(torch.randn(2, 6, 3, 3))).all()


def test_symbolic_trace():
    """A module is a leaf of the trace, as torch.nn's are, and a call of the function is one node."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), fastnorm.BatchNorm2d(6, activation="relu"))
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))
    function = torch.fx.symbolic_trace(lambda x: fastnorm.functional.batch_norm(x, None, None, training=True))
    assert [n.op for n in function.graph.nodes] == ["placeholder", "call_function", "output"]
    torch.testing.assert_close(function(x), fastnorm.functional.batch_norm(x, None, None, training=True))


def test_jit_trace():
    norm = fastnorm.BatchNorm2d(6, activation="relu").eval()
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(torch.jit.trace(norm, (x,))(x + 1), norm(x + 1))


def test_data_parallel_training(tmp_path):
    """DistributedDataParallel in one process: gradients, buffers and counter."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        norms = [fastnorm.BatchNorm2d(6, activation="relu") for _ in range(2)]
        parallel = nn.parallel.DistributedDataParallel(norms[0])
        x = torch.randn(4, 6, 3, 3)
        for m in (parallel, norms[1]):
            m(x).square().sum().backward()
        torch.testing.assert_close(state(norms[0]), state(norms[1]))
        torch.testing.assert_close([p.grad for p in norms[0].parameters()], [p.grad for p in norms[1].parameters()])
    finally:
        leave_process_group()


# ---- Errors: the class that torch raises, and a message that names what is wrong -------------------------------------

x = torch.ones(4, 3, 5, 5)
v = torch.ones(3)
ERRORS = {
    "weight shape": (
        RuntimeError,
        "batch_norm: weight must have shape (3,), got (4,)",
        lambda f: f(x, None, None, torch.ones(4), v, True),
    ),
    "bias shape": (
        RuntimeError,
        "batch_norm: bias must have shape (3,), got (4,)",
        lambda f: f(x, None, None, v, torch.ones(4), True),
    ),
    "mean shape": (
        RuntimeError,
        "batch_norm: running_mean must have shape (3,), got (4,)",
        lambda f: f(x, torch.ones(4), v, training=True),
    ),
    "no statistics": (
        RuntimeError,
        "batch_norm: running_mean and running_var must be given in evaluation mode",
        lambda f: f(x, None, None),
    ),
    "one statistic": (
        ValueError,
        "batch_norm: running_mean and running_var must both be given",
        lambda f: f(x, v.clone(), None, training=True),
    ),
    "integers": (
        NotImplementedError,
        "batch_norm: input must be float64, float32, float16 or bfloat16, got int32",
        lambda f: f(x.int(), None, None, training=True),
    ),
    "dimensions": (
        IndexError,
        "batch_norm: the input must have 2 or more dimensions (N, C, ...), got shape (5,)",
        lambda f: f(x[0, 0, 0], None, None, training=True),
    ),
    "weight dtype": (
        RuntimeError,
        "batch_norm: weight and bias must be float32 like the input",
        lambda f: f(x, None, None, v.double(), v.double(), True),
    ),
    "half weight": (
        RuntimeError,
        "got float16",
        lambda f: f(x, None, None, v.half(), None, True),
    ),
    "two dtypes": (
        RuntimeError,
        "batch_norm: weight and bias must have one dtype, got float32 and bfloat16",
        lambda f: f(x.bfloat16(), None, None, v, v.bfloat16(), True),
    ),
    "device": (
        RuntimeError,
        "batch_norm: weight must be on cpu like the input, got meta",
        lambda f: f(x, None, None, v.to("meta"), None, True),
    ),
    "eps 0": (
        ValueError,
        "batch_norm: eps must be positive when training, got 0",
        lambda f: f(x, None, None, training=True, eps=0),
    ),
    "eps < 0": (
        ValueError,
        "batch_norm: eps must not be negative, got -1",
        lambda f: f(x, v, v, eps=-1),
    ),
    "one value": (
        ValueError,
        "Expected more than 1 value per channel when training, got input size",
        lambda f: f(x[:1, :, :1, :1], None, None, training=True),
    ),
    "momentum": (
        TypeError,
        "momentum",
        lambda f: f(x, v.clone(), v.clone(), training=True, momentum=None),
    ),
    "gradient of statistics": (
        RuntimeError,
        "batch_norm: running_mean must not require a gradient",
        lambda f: f(x, v.clone().requires_grad_(), v.clone(), training=True),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs_classes(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind) as raised:
        call(fastnorm.functional.batch_norm)
    assert type(raised.value) is kind and message in str(raised.value)
    with pytest.raises(kind) as raised:
        call(nn.functional.batch_norm)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"residual": torch.ones(4, 3, 5, 4)}, "residual must have the input's shape (4, 3, 5, 5), got (4, 3, 5, 4)"),
        ({"residual": torch.ones(4, 3, 5, 5).double()}, "residual must have the input's dtype float32, got float64"),
        ({"weight": torch.ones(4)}, "weight must have shape"),
        ({"running_var": torch.ones(4)}, "running_var must have shape (3,), got (4,)"),
    ],
)  # fmt: skip
def test_nothing_is_written_when_an_argument_is_wrong(change, message):
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)} | change
    before = {n: t.clone() for n, t in arguments.items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        fastnorm.functional.batch_norm(x, training=True, **arguments)
    assert all(torch.equal(t, before[n]) and t._version == 0 for n, t in arguments.items())


def test_the_counter_stays_when_an_argument_is_wrong():
    norm = fastnorm.BatchNorm2d(3)
    with pytest.raises(RuntimeError):
        norm(x, torch.ones(4, 3, 5, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x[:1, :, :1, :1])
    assert norm.num_batches_tracked == 0


@EACH
def test_wrong_number_of_dimensions(cls, torch_cls, shape):
    for dims in ((6,), (6, 3), (2, 6, 3), (2, 6, 3, 3), (2, 6, 2, 2, 2), (2, 6, 1, 1, 1, 2)):
        outcomes = []
        for c in (cls, torch_cls):
            try:
                outcomes.append(c(dims[1] if len(dims) > 1 else 6)(torch.ones(dims)).shape)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_unknown_activation():
    for call in (
        lambda: fastnorm.BatchNorm2d(3, activation="swish"),
        lambda: fastnorm.functional.batch_norm(x, None, None, training=True, activation="swish"),
    ):
        with pytest.raises(ValueError, match=r"activation must be .*relu.*hardswish, got '?swish'?"):
            call()


@pytest.mark.parametrize("module", ["batch_norm", "_info"])
def test_examples_in_docstrings(module):
    import importlib

    found = importlib.import_module(f"fastnorm.{module}")
    globs = {"torch": torch, **vars(fastnorm), **vars(found)}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(found, globs=globs):
        runner.run(test)
    assert runner.summarize(verbose=False).attempted > 0 and runner.failures == 0
