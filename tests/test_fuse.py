"""fastnorm.fuse: what it fuses, what it leaves alone, and that a model stays what it was."""

import copy
import doctest
import importlib
import operator
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import FAMILIES, DenseNet, ResidualBlock, ResidualNet, UNet, assert_same, losses_in_a_process_group, train
from torch import nn

import fastnorm

FUSED = {"ResidualNet": 6, "DenseNet": 7, "UNet": 10, "ConvNeXt": 0, "Transformer": 1}


class Net(nn.Module):
    """A norm and whatever `then` does with its output and the input."""

    def __init__(self, then, norm=None):
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(4)
        self.then = then

    def forward(self, x):
        return self.then(self.norm(x), x)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def fused(model):
    return [f.what for f in fastnorm.fuse(model).fuse_report.fused]


def reasons(model):
    return {s.name: s.reason for s in fastnorm.fuse(model).fuse_report.skipped}


def assert_equivalent(model, *inputs, modes=(True, False)):
    """Outputs, gradients and buffers of a fused copy of the model."""
    inputs = inputs or (torch.randn(3, 4, 5, 5),)
    other = fastnorm.fuse(copy.deepcopy(model))
    for training in modes:
        results = []
        for m in (model, other):
            args = [x.clone().requires_grad_() for x in inputs]
            m.train(training).zero_grad()
            y = m(*[a * 1 for a in args])  # not leaves, which nothing may change in place
            y.square().sum().backward()
            grads = [p.grad for p in m.parameters()]
            results.append((y, [a.grad for a in args], grads, list(m.buffers())))
        assert_same(*results, rtol=1e-3, atol=1e-4)
    return other


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Trajectory, outputs and state_dicts, there and back."""
    model = FAMILIES[name]().double()
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    assert fastnorm.fuse(model) is model
    assert len(model.fuse_report.fused) == FUSED[name], model.fuse_report
    assert type(model).__name__ == name and isinstance(model, FAMILIES[name])
    assert_same(train(model), train(twin))
    assert_same(model.state_dict(), twin.state_dict())
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model.eval()(x), twin.eval()(x))
    fresh = fastnorm.fuse(FAMILIES[name]().double().eval())
    fresh.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(fresh.state_dict(), strict=True)
    assert_same(fresh(x), twin(x))
    fastnorm.revert(model)
    assert type(model) is FAMILIES[name] and not hasattr(model, "fuse_report")
    assert all("fastnorm" not in type(m).__module__ for m in model.modules())
    assert_same(model(x), twin(x))


ACTIVATIONS = {
    "F.relu": lambda y, x: F.relu(y), "F.relu in place": lambda y, x: F.relu(y, inplace=True),
    "torch.relu": lambda y, x: torch.relu(y), "relu": lambda y, x: y.relu(), "relu_": lambda y, x: y.relu_(),
    "torch.relu_": lambda y, x: torch.relu_(y), "relu6": lambda y, x: F.relu6(y),
    "leaky_relu": lambda y, x: F.leaky_relu(y, 0.2),
    "leaky_relu keyword": lambda y, x: F.leaky_relu(y, negative_slope=0.3),
    "elu": lambda y, x: F.elu(y), "sigmoid": lambda y, x: torch.sigmoid(y), "F.sigmoid": lambda y, x: F.sigmoid(y),
    "tanh": lambda y, x: y.tanh(), "silu": lambda y, x: F.silu(y), "gelu": lambda y, x: F.gelu(y),
    "gelu tanh": lambda y, x: F.gelu(y, approximate="tanh"), "hardswish": lambda y, x: F.hardswish(y),
}  # fmt: skip
SUMS = {
    "+": lambda y, x: F.relu(y + x), "swapped": lambda y, x: F.relu(x + y), "add": lambda y, x: torch.add(y, x).relu(),
    "alpha 1": lambda y, x: torch.add(y, x, alpha=1).relu_(), "other": lambda y, x: torch.add(y, other=x).relu(),
    "method": lambda y, x: y.add(x).sigmoid(), "add_": lambda y, x: F.silu(y.add_(x)),
    "iadd": lambda y, x: F.gelu(operator.iadd(y, x)), "sum alone": lambda y, x: y + x,
}  # fmt: skip


@pytest.mark.parametrize("then", [*ACTIVATIONS.values(), *SUMS.values()], ids=[*ACTIVATIONS, *SUMS])
def test_functions_and_methods(then):
    model = Net(then)
    assert len(fused(copy.deepcopy(model))) == 1
    assert_equivalent(model)


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(),
     nn.GELU(), nn.GELU("tanh"), nn.Hardswish()],
    ids=repr,
)  # fmt: skip
def test_modules(act):
    model = nn.Sequential(nn.BatchNorm2d(4), act)
    assert len(fused(copy.deepcopy(model))) == 1
    assert_equivalent(model)


def statement_in_place(y, x):
    y += x
    y.relu_()
    return y * 2


CONVOLUTION_THEN = {
    "relu": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(), "another slope": nn.LeakyReLU(0.3), "gelu": nn.GELU(),
    "relu6": nn.ReLU6(), "elu": nn.ELU(),
}  # fmt: skip


@pytest.mark.parametrize("act", CONVOLUTION_THEN)
def test_convolutions(act):
    act = CONVOLUTION_THEN[act]
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), act, nn.Conv2d(6, 4, 1, padding_mode="reflect"), nn.BatchNorm2d(4), copy.deepcopy(act)
    )
    name = type(act).__name__
    assert fused(copy.deepcopy(model)) == [f"0 (Conv2d) + 1 ({name})", f"3 (BatchNorm2d) + 4 ({name})"]
    assert_equivalent(model)


def test_convolutions_and_slopes_that_change():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.LeakyReLU())
    other = fastnorm.fuse(copy.deepcopy(model))
    model[1].negative_slope = other[1].negative_slope = 0.7
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(other(x), model(x))


def test_a_convolution_leaves_sums_alone():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.a(x) + self.norm(self.b(x)))

    assert fused(Sum()) == ["norm (BatchNorm2d) + add + relu"]
    assert_equivalent(Sum())


def test_statements_in_place():
    assert fused(Net(statement_in_place)) == ["norm (BatchNorm2d) + iadd + relu_"]
    assert_equivalent(Net(statement_in_place))


NORMS = {
    "LayerNorm": (nn.LayerNorm(5), (3, 4, 5)), "GroupNorm": (nn.GroupNorm(2, 4), (3, 4, 5, 5)),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 5)),
    "InstanceNorm1d, no batch": (nn.InstanceNorm1d(4), (4, 5)), "BatchNorm1d": (nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm3d": (nn.BatchNorm3d(4), (3, 4, 2, 3, 3)), "RMSNorm": (nn.RMSNorm(5), (3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("norm, shape", NORMS.values(), ids=NORMS)
def test_norms(norm, shape):
    model = Net(lambda y, x: F.silu(y + x), norm)
    assert len(fused(copy.deepcopy(model))) == 1
    assert_equivalent(model, torch.randn(shape))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training, 0.2))
        y = F.silu(F.group_norm(y, 2, weight=self.weight, eps=1e-3) + x)
        return torch.sigmoid(F.layer_norm(y, y.shape[1:]))


def test_functional_norms():
    assert fused(Functional()) == ["batch_norm + relu", "group_norm + add + silu", "layer_norm + sigmoid"]
    assert_equivalent(Functional())


LEFT = {
    "the output is used twice": lambda y, x: F.relu(y) + y, "x * sigmoid(x)": lambda y, x: y * torch.sigmoid(y),
    "another tensor is added to": lambda y, x: operator.iadd(x * 1, y), "alpha": lambda y, x: torch.add(y, x, alpha=2),
    "elu's alpha": lambda y, x: F.elu(y, 0.5),
    "a number": lambda y, x: y + 1, "itself": lambda y, x: y + y, "minus": lambda y, x: y - x,
}  # fmt: skip


@pytest.mark.parametrize("then", LEFT.values(), ids=LEFT)
def test_left_alone(then):
    assert fused(Net(then)) == []
    assert_equivalent(Net(then))


def test_a_tensor_that_is_changed_for_its_owner():
    """``x += norm(x)`` changes the caller's tensor, another name of a changed tensor sees it, and a norm is not put off
    until after its input has changed."""

    def to_input(y, x):
        x += y
        return F.relu(x)

    def two_names(y, x):
        other = y
        y += x
        return F.relu(y) + other

    def input_changes(y, x):
        x.sigmoid_()  # not only scaled, which a norm does not see
        return F.relu(y + x)

    for then in (to_input, two_names, input_changes):
        plain, other = Net(then), Net(then)
        fastnorm.fuse(other)
        a = torch.randn(2, 4, 3, 3)
        b = a.clone()
        with torch.no_grad():
            assert_same(other(b), plain(a))
        assert_same(b, a)


def test_sums_that_do_not_fit_are_seen_at_the_call():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x, y):
            return F.relu(self.norm(x) + y)

    x = torch.randn(3, 4, 5, 5)
    assert len(fused(Add())) == 1
    for y in (torch.randn(4, 1, 1), torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, 5), x):
        plain, other = Add(), fastnorm.fuse(Add())
        a, b = plain(x, y), other(x, y)
        assert a.dtype == b.dtype
        assert_same(a, b)
    assert_same(fastnorm.fuse(Add())(x, 2.0), Add()(x, 2.0))


def test_hooks():
    """Those that are there, and those that come later: on the norm, the activation, or a container between."""
    model = ResidualNet().eval()
    calls = []
    model.layers[0].bn1.register_forward_hook(lambda m, x, y: calls.append("bn1"))
    assert reasons(model)["layers.0.bn1"] == "has hooks"
    assert len(model.fuse_report.fused) == FUSED["ResidualNet"] - 1
    x, plain = torch.randn(2, 3, 16, 16), fastnorm.revert(copy.deepcopy(model)) and copy.deepcopy(model)
    expected = plain(x)
    later = {
        "bn2": model.layers[0].bn2, "relu": model.layers[0].relu, "layers": model.layers, "last": model.last,
        "block": model.layers[1],
    }  # fmt: skip
    calls.clear()
    for name, module in later.items():
        module.register_forward_hook(lambda m, x, y, name=name: calls.append(name))
    assert_same(model(x), expected)
    assert sorted(calls) == ["block", "bn1", "bn2", "last", "layers", "relu", "relu"]


class KeepingConv2d(nn.Conv2d):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.norm(y)) * y


def test_inference_in_the_memory_of_the_convolution(monkeypatch):
    """A norm may overwrite the result of the convolution before it only if nobody else has that."""
    in_place = []
    overwrite = fastnorm._C.batch_norm_inference_
    monkeypatch.setattr(fastnorm._C, "batch_norm_inference_", lambda x, *a: in_place.append(x) or overwrite(x, *a))

    def count(model, grad=False):
        x, plain = torch.randn(2, 3, 7, 7), copy.deepcopy(model)
        fastnorm.revert(plain)
        with torch.set_grad_enabled(grad):
            expected = plain(x)
            in_place.clear()
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        return len(in_place)

    def block(conv=nn.Conv2d):
        return nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    plain = fastnorm.fuse(block()).eval()
    assert count(plain) == 1 and count(plain, grad=True) == 0 and count(plain.train()) == 0
    seen = []
    handle = plain.eval()[0].register_forward_hook(lambda module, args, y: seen.append(y))
    assert count(plain) == 0 and seen[0].min() < 0
    handle.remove()
    assert count(plain) == 1
    kept = fastnorm.fuse(block(KeepingConv2d)).eval()
    assert count(kept) == 0 and kept[0].kept.min() < 0
    assert count(fastnorm.fuse(TwoUses()).eval()) == 0
    assert count(fastnorm.fuse(ResidualBlock(3, 3)).eval()) == 2


def test_changes_after_fusing():
    """A module replaced, an attribute set, a mode changed, a container extended: the forward follows."""
    model, x = ResidualNet(), torch.randn(2, 3, 16, 16)
    fastnorm.fuse(model)
    twin = copy.deepcopy(model)
    fastnorm.revert(twin)

    def both(change):
        for m in (model, twin):
            change(m)
        for training in (True, False):
            assert_same(model.train(training)(x), twin.train(training)(x))

    both(lambda m: setattr(m.layers[0], "relu", nn.SiLU()))
    both(lambda m: setattr(m.layers[0], "relu", nn.ELU(0.3)))
    both(lambda m: setattr(m.layers[0], "bn1", nn.Identity()))
    both(lambda m: m.stem.append(nn.Tanh()))
    both(lambda m: m.last.append(nn.Sigmoid()))
    both(lambda m: m.layers[1].bn2.eval())
    both(lambda m: setattr(m.layers[0], "downsample", nn.Softplus()))
    dense, x = fastnorm.fuse(DenseNet()), torch.randn(2, 3, 16, 16)
    dense.layers[1].drop_rate = 1.0
    plain = copy.deepcopy(dense)
    fastnorm.revert(plain)
    assert_same(dense(x), plain(x))
    block = fastnorm.fuse(ResidualBlock(4, 4))
    block.bn1.activation = "tanh"
    x = torch.randn(2, 4, 5, 5)
    y = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    assert_same(block(x), y)


class Untraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.block, self.alpha = nn.BatchNorm2d(4), ResidualBlock(4, 4), [1.0]

    def body(self, x):
        return self.block(F.relu(self.norm(x)))

    def forward(self, x):
        return self.body(x) if x.sum() > 1e9 else self.body(x) * 2


class Random(Untraced):
    def forward(self, x):
        return self.body(x) if random.random() < 2 else x


class RandomTensor(Untraced):
    def forward(self, x):
        return self.body(x) * torch.rand(()).ceil()


class Sets(Untraced):
    def forward(self, x):
        self.last = self.body(x)
        return self.last


class NoGrad(Untraced):
    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.norm(x))
        return self.block(y)


class Autocast(Untraced):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x).float()


class Checkpoint(Untraced):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Custom(Untraced):
    def forward(self, x):
        return Twice.apply(self.body(x))


class Asks(Untraced):
    def forward(self, x):
        y = self.body(x)
        return y if isinstance(y, torch.Tensor) else y[0]


class Reads(Untraced):
    def forward(self, x):
        self.options = self.__dict__.get("options", {"scale": 2})
        return self.body(x)


@pytest.mark.parametrize(
    "cls, reason",
    [(Untraced, "control flow"), (Random, "random numbers"), (RandomTensor, "neither an input"),
     (Sets, "sets self.last"),
     (NoGrad, "context"), (Autocast, "context"), (Checkpoint, "context|_NoopSaveInputs"),
     (Custom, "autograd function Twice"), (Asks, "asks for the type"), (Reads, "sets self.options")],
)  # fmt: skip
def test_what_cannot_be_traced(cls, reason):
    """It is named in the report, left as it is, and its submodules are fused."""
    model = cls()
    before, generator = torch.get_rng_state(), random.getstate()
    assert re.search(reason, reasons(model)[""]) and type(model) is cls  # torch 2.10 calls a function first
    assert torch.equal(before, torch.get_rng_state()) and generator == random.getstate()
    assert [f.name for f in model.fuse_report.fused] == ["block", "block"]
    tolerance = {"rtol": 0.05, "atol": 0.05} if cls is Autocast else {}
    fastnorm.revert(model)
    twin, x = copy.deepcopy(model), torch.randn(3, 4, 5, 5, requires_grad=True)
    fastnorm.fuse(model)
    grads = []
    for m in (model, twin):
        y = m(x)
        y.sum().backward()
        grads.append((y, m.block.conv1.weight.grad))
    assert_same(*grads, **tolerance)


def test_optional_arguments():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x, emb=None, scale=1.0, residual=None):
            if emb is not None:
                x = x + emb
            y = F.silu(self.norm(x) * scale if scale != 1.0 else self.norm(x))
            return y if residual is None else y + residual

    plain, other = Step(), fastnorm.fuse(Step())
    assert len(other.fuse_report.fused) == 1
    x, e = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    for args, kwargs in [
        ((x,), {}), ((x, e), {}), ((x,), {"emb": e}), ((), {"x": x, "residual": x}), ((x, e, 2.0), {}),
        ((x, e, 1.0, x), {}), ((x,), {"scale": 3.0}), ((x, None, 1.0), {}),
    ]:  # fmt: skip
        assert_same(other(*args, **kwargs), plain(*args, **kwargs))
    for m in (plain, other):
        with pytest.raises(TypeError, match="forward"):
            m(x, nothing=1)
        with pytest.raises(TypeError, match="forward"):
            m()


def test_lists_and_tensors():
    """A forward that asks isinstance(x, Tensor) is traced both ways."""
    model = DenseNet().layers[0]
    other = assert_equivalent(model, torch.randn(2, 8, 5, 5))
    x = torch.randn(2, 8, 5, 5)
    assert_same(other.eval()([x[:, :3], x[:, 3:]]), model.eval()([x[:, :3], x[:, 3:]]))


def test_twice_and_skip():
    model = ResidualNet()
    first = str(fastnorm.fuse(model).fuse_report.fused)
    assert str(fastnorm.fuse(model).fuse_report.fused) == first
    fastnorm.revert(model)
    assert all(vars(m).get("fuse_report") is None for m in model.modules())
    left = [f.name for f in fastnorm.fuse(model, skip=("layers.0", nn.SiLU)).fuse_report.fused]
    assert "layers.0" not in left and "layers.1" in left
    assert type(model.layers[0]) is ResidualBlock and type(model.layers[0].bn1) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="fuse: skip must name modules"):
        fastnorm.fuse(model, skip="nothing")
    with pytest.raises(TypeError, match="fuse: the model must be"):
        fastnorm.fuse(F.relu)


def test_modules_with_two_names_and_uses():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.again, self.act = nn.BatchNorm2d(4), None, nn.ReLU()
            self.again = self.norm

        def forward(self, x):
            return self.act(self.norm(self.act(self.again(x))))

    assert len(fused(Shared())) == 2
    assert_equivalent(Shared())


def test_copies():
    """deepcopy, pickle and averaged copies are fused too; copies of what was not, are not."""
    model = ResidualNet().eval()
    fastnorm.fuse(model)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    average = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        assert type(other) is type(model) and type(other.layers[0]) is type(model.layers[0])
        assert torch.equal(other.eval()(x), expected)
    reverted = copy.deepcopy(model)
    fastnorm.revert(reverted)
    assert type(pickle.loads(pickle.dumps(reverted))) is ResidualNet
    assert_same(reverted(x), expected)


def test_compile_export_trace():
    torch.compiler.reset()
    x = torch.randn(2, 3, 16, 16)
    model = fastnorm.fuse(ResidualNet().eval())
    expected = model(x)
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), expected)
    traced = torch.fx.symbolic_trace(model)
    assert_same(traced(x), expected)
    assert len(fused(traced)) == FUSED["ResidualNet"]
    assert_same(traced(x), expected)


def test_autocast_and_channels_last():
    model = UNet()
    twin = copy.deepcopy(model)
    fastnorm.fuse(model).to(memory_format=torch.channels_last)
    twin.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert_same(model(x), twin(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = model(x), twin(x)
    assert y.dtype == z.dtype
    assert_same(y, z, rtol=5e-2, atol=5e-2)


def test_wrapped_in_data_parallel_for_processes(tmp_path):
    def change(model):
        assert fastnorm.fuse(model) is model and len(model.fuse_report.fused) == FUSED["ResidualNet"]

    never, before, after = losses_in_a_process_group(tmp_path, lambda: ResidualNet().double(), change)
    assert_same(before, never)
    assert_same(after, never)


def test_documentation():
    module = importlib.import_module("fastnorm.fuse")
    assert doctest.testmod(module, extraglobs={"nn": nn}).failed == 0
