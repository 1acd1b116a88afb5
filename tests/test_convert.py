"""fastnorm.convert and revert: any model, in place, with everything that refers to its modules."""

import copy
import doctest
import importlib
import io
import pickle

import pytest
import torch
from nets import assert_same, losses_in_a_process_group, train
from torch import nn
from torch.nn.utils import parametrize

import fastnorm

LAYERS = {
    "BatchNorm1d": (6,), "BatchNorm2d": (6,), "BatchNorm3d": (6,), "SyncBatchNorm": (6,), "LayerNorm": (6,),
    "RMSNorm": (6,), "GroupNorm": (2, 6), "InstanceNorm1d": (6,), "InstanceNorm2d": (6,), "InstanceNorm3d": (6,),
}  # fmt: skip
CHANNELS_LAST = ("LayerNorm", "RMSNorm")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


class Net(nn.Module):
    """Convolutions, norms of each kind, one of them under two names, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.shared = nn.GroupNorm(2, 8)
        self.same = self.shared
        self.instance = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.head = nn.Linear(8, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        x = self.same(self.shared(self.stem(x)).relu())
        return self.norm(self.head(self.instance(x).mean((2, 3))))


def attributes(model):
    """What a module is made of, but for its class: names and identities."""
    return {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}


def test_every_layer_that_torch_has_too():
    """Those of fastnorm.layers that subclass their namesake, whichever there are."""
    assert set(LAYERS) <= {c.__name__ for c in importlib.import_module("fastnorm.convert").REPLACEMENTS}
    model = nn.ModuleDict({name: getattr(nn, name)(*arguments) for name, arguments in LAYERS.items()})
    before, shown = attributes(model), repr(model)
    report = fastnorm.convert(model)
    assert [r.name for r in report.replaced] == list(LAYERS) and not report.skipped
    for name, module in model.items():
        assert type(module) is getattr(fastnorm, name)
        spatial = int(name[-2]) if name.endswith("d") else 1
        x = torch.randn(2, 3, 6) if name in CHANNELS_LAST else torch.randn(2, 6, *[3] * spatial)
        assert_same(module(x), getattr(nn, name)(*LAYERS[name])(x))
    assert repr(model) == shown
    fastnorm.revert(model)
    assert attributes(model) == before and repr(model) == shown
    assert all(type(m) is getattr(nn, name) for name, m in model.items())


def test_nothing_but_the_class_changes():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, modules = dict(model.named_parameters()), dict(model.named_modules(remove_duplicate=False))
    held, buffers = [id(p) for g in optimizer.param_groups for p in g["params"]], dict(model.named_buffers())
    report = fastnorm.convert(model)
    assert {r.name for r in report.replaced} >= {"stem.1", "shared", "instance", "norm"}
    assert all(p is names[n] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    assert all(m is modules[n] for n, m in model.named_modules(remove_duplicate=False))
    assert model.shared is model.same and type(model.shared) is fastnorm.GroupNorm
    assert held == [id(p) for p in model.parameters()]
    assert type(model.stem[2]) is nn.ReLU and type(model) is Net


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_is_the_same(optimizer):
    model = Net().double()  # so that roundings do not grow over the steps
    twin = copy.deepcopy(model)
    fastnorm.convert(model)
    assert_same(train(model, optimizer=optimizer), train(twin, optimizer=optimizer))
    assert_same(model.state_dict(), twin.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_same(model.eval()(x), twin.eval()(x))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_same(model(x), twin(x))
    model.load_state_dict(twin.state_dict(), strict=True)
    fastnorm.revert(model)
    assert torch.equal(model(x), twin(x))


def test_twice_and_back():
    model = Net()
    before, shown = attributes(model), repr(model)
    fastnorm.convert(model)
    again = fastnorm.convert(model)
    assert not again.replaced and {s.reason for s in again.skipped} == {"is fastnorm's already"}
    assert len(fastnorm.revert(model).replaced) == len(again.skipped)
    assert not fastnorm.revert(model).replaced
    assert attributes(model) == before and repr(model) == shown


def test_revert_leaves_what_was_fastnorms():
    model = nn.Sequential(fastnorm.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4))
    fastnorm.convert(model)
    fastnorm.revert(model)
    assert type(model[0]) is fastnorm.BatchNorm2d and model[0].activation == "relu"
    assert type(model[1]) is nn.BatchNorm2d
    fastnorm.convert(model)
    model[1].activation = "silu"
    report = fastnorm.revert(model)
    assert type(model[1]) is fastnorm.BatchNorm2d and "'silu'" in report.skipped[0].reason


def test_the_model_is_a_layer():
    norm = nn.LayerNorm(4)
    assert fastnorm.convert(norm).replaced[0].name == "" and type(norm) is fastnorm.LayerNorm
    assert "(the model)" in str(fastnorm.revert(norm)) and type(norm) is nn.LayerNorm


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_skipped_and_why():
    scripted = torch.jit.script(nn.BatchNorm2d(4))
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": Doubling(4), "lazy": nn.LazyBatchNorm2d(), "scripted": scripted, "patched": patched,
            "float8": nn.LayerNorm(4, dtype=torch.float8_e4m3fn) if hasattr(torch, "float8_e4m3fn") else nn.Identity(),
            "fine": nn.BatchNorm2d(4),
        }
    )  # fmt: skip
    report = fastnorm.convert(model)
    reasons = {s.name: s.reason for s in report.skipped}
    assert [r.name for r in report.replaced] == ["fine"]
    for name, reason in {
        "subclass": "is a subclass of nn.BatchNorm2d", "lazy": "is lazy", "scripted": "torch.jit",
        "patched": "forward was replaced", "float8": "float8",
    }.items():  # fmt: skip
        assert reason in reasons[name] and reason in str(report)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model["subclass"](x), 2 * nn.BatchNorm2d(4)(x))
    model["lazy"](x)
    assert "lazy" in [r.name for r in fastnorm.convert(model).replaced]


@pytest.mark.parametrize(
    "skip, left",
    [("stem.1", {"stem.1"}), ("stem", {"stem.1"}), (nn.GroupNorm, {"shared"}),
     (("same", nn.LayerNorm), {"shared", "norm"})],
)  # fmt: skip
def test_skip(skip, left):
    model = Net()
    report = fastnorm.convert(model, skip=skip)
    assert {s.name for s in report.skipped if s.reason == "named in skip"} >= left
    assert not left & {r.name for r in report.replaced}
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d)}
    assert norms - left <= {r.name for r in report.replaced}


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"convert: the model must be a torch\.nn\.Module, got int"):
        fastnorm.convert(1)
    with pytest.raises(TypeError, match=r"revert: the model must be a torch\.nn\.Module, got int"):
        fastnorm.revert(1)
    model = Net()
    with pytest.raises(ValueError, match="skip must name modules of the model, got 'stemm'"):
        fastnorm.convert(model, skip="stemm")
    with pytest.raises(TypeError, match="names and types of modules, got 3"):
        fastnorm.convert(model, skip=(3,))
    assert type(model.norm) is nn.LayerNorm


def test_hooks_modes_dtypes():
    model, calls = Net().double(), []
    model.stem[1].register_forward_hook(lambda m, x, y: calls.append(type(m)))
    model.norm.register_full_backward_hook(lambda m, dx, dy: calls.append(type(m)))
    model.stem[1].eval()
    fastnorm.convert(model)
    model(torch.randn(2, 3, 9, 9, dtype=torch.float64)).sum().backward()
    assert calls == [fastnorm.BatchNorm2d, fastnorm.LayerNorm]
    assert model.training and not model.stem[1].training and model.stem[1].num_batches_tracked == 0
    assert model.half().norm.weight.dtype == torch.float16


def test_parametrized():
    """parametrize puts a class of its own over the module's, and may be undone after the conversion or its reversal."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    for norm in model:
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 3, 3)
    assert len(fastnorm.convert(model).replaced) == 2
    assert isinstance(model[0], fastnorm.BatchNorm2d) and not isinstance(twin[0], fastnorm.BatchNorm2d)
    assert_same(model(x), twin(x))
    model[0].parametrizations.weight.original.data.add_(1)
    twin[0].parametrizations.weight.original.data.add_(1)
    assert_same(copy.deepcopy(model)(x), twin(x))
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is fastnorm.BatchNorm2d
    fastnorm.revert(model)
    assert type(model[0]) is nn.BatchNorm2d and type(model[1]).__bases__ == (nn.GroupNorm,)
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.GroupNorm
    assert_same(model(x), twin(x))


def test_copies_and_averages():
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    fastnorm.convert(model)
    train(model)
    average.update_parameters(model)
    assert type(average.module.norm) is nn.LayerNorm
    fastnorm.convert(average)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(2, 3, 9, 9)
    for other in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert type(other.norm) is fastnorm.LayerNorm and torch.equal(other.eval()(x), model.eval()(x))
        fastnorm.revert(other)
        assert type(other.norm) is nn.LayerNorm and type(model.norm) is fastnorm.LayerNorm
        assert_same(other(x), model(x))


def test_compiled_before_and_after():
    torch.compiler.reset()
    x = torch.randn(2, 3, 9, 9)
    model = Net().eval()
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(x), expected)
    assert fastnorm.convert(compiled).replaced
    assert_same(compiled(x), expected)
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def test_autocast_and_channels_last():
    model = Net()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    fastnorm.convert(model)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    assert_same(model(x), twin(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = model(x), twin(x)
    assert y.dtype == z.dtype
    assert_same(y, z, rtol=5e-2, atol=5e-2)


def test_transformer_encoder():
    """In evaluation torch's layer takes a fast path of its own, which reads the norms' parameters."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    twin = copy.deepcopy(model)
    assert len([r for r in fastnorm.convert(model).replaced if r.after == "fastnorm.LayerNorm"]) == 5
    x = torch.randn(3, 7, 16)
    assert_same(model(x), twin(x))
    with torch.no_grad():
        assert_same(model.eval()(x), twin.eval()(x))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    assert_same(model(x, src_key_padding_mask=mask)[0], twin(x, src_key_padding_mask=mask)[0])


def test_distributed(tmp_path):
    """Converted before and inside of DistributedDataParallel."""
    never, before, after = losses_in_a_process_group(tmp_path, lambda: Net().double(), fastnorm.convert)
    assert_same(before, never)
    assert_same(after, never)


def test_documentation():
    module = importlib.import_module("fastnorm.convert")
    assert doctest.testmod(module, extraglobs={"nn": nn, "torch": torch}).failed == 0
