"""fastnorm.save_memory: bitwise the same results from fewer bytes."""

import copy
import doctest
import gc
import importlib

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import to_layout
from nets import FAMILIES, DenseNet, ResidualBlock, ResidualNet, UNet, assert_same, train
from torch import nn

import fastnorm
from benchmarks.twins import twin
from fastnorm import models, save_memory, saved_bytes


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


class Saving(nn.Module):
    """A model whose calls run under save_memory."""

    def __init__(self, model, **arguments):
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, *args):
        with save_memory(**self.arguments):
            return self.model(*args)


def results(model, *inputs):
    """Output, gradients of inputs and parameters, buffers."""
    model.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = model(*leaves)
    y.square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    return [y.detach(), *(x.grad for x in leaves), *grads, *(b.clone() for b in model.buffers())]


def assert_equal(a, b):
    assert len(a) == len(b)
    for t, u in zip(a, b, strict=True):
        assert torch.equal(t, u)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Two steps each, bit for bit, with the running statistics updated once in each."""
    model = fastnorm.fuse(FAMILIES[name]())
    saving = Saving(copy.deepcopy(model))
    for _ in range(2):
        x = torch.randn(2, 3, 16, 16)
        assert_equal(results(model, x), results(saving, x))
    counts = [b for n, b in saving.named_buffers() if n.endswith("tracked")]
    assert all(c == 2 for c in counts)
    assert saved_bytes(saving, x) < saved_bytes(model, x)


def conv_stack(depth=4, channels=8, norm=nn.BatchNorm2d, act=nn.ReLU):
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1, bias=False), norm(channels), act()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 2, 1))


# what is allowed of torch.nn's bytes
BYTES = {
    "conv-norm-relu": (conv_stack, (2, 3, 32, 32), 0.55),
    "vgg16_bn": (lambda: twin("vgg16_bn", 10, small=True), (2, 3, 32, 32), 0.6),
    "U-Net": (UNet, (2, 3, 32, 32), 0.5),
    "resnet18": (lambda: twin("resnet18", 10, small=True), (2, 3, 32, 32), 0.6),
    "densenet121": (lambda: twin("densenet121", 10, small=True), (2, 3, 32, 32), 0.4),
    "googlenet": (lambda: twin("googlenet", 10, small=True), (2, 3, 32, 32), 0.65),
}


@pytest.mark.parametrize("build, shape, allowed", BYTES.values(), ids=BYTES)
def test_bytes(build, shape, allowed):
    """Against torch.nn, whose layers the same model has before it is fused."""
    model, x = build(), torch.randn(shape)
    before = saved_bytes(model, x)
    fastnorm.fuse(model, save_memory=True)
    assert saved_bytes(model, x) <= allowed * before


def test_concatenations():
    model, x = fastnorm.fuse(DenseNet()), torch.randn(2, 3, 16, 16)
    with_parts, without = saved_bytes(Saving(model), x), saved_bytes(Saving(model, concatenations=False), x)
    assert with_parts < 0.7 * without and without < 0.7 * saved_bytes(model, x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = fastnorm.BatchNorm2d(4), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y = torch.concat(tensors=(self.norm(x), x), dim=1)
            return self.conv(torch.cat([self.conv(y), 2 * self.conv(y)], -1))

    net, x = Net(), torch.randn(2, 4, 9, 9)
    saving = Saving(copy.deepcopy(net))
    assert_equal(results(net, x), results(saving, x))


NORMS = {
    "batch": (lambda a: fastnorm.BatchNorm2d(6, activation=a), (3, 6, 5, 7)),
    "batch, rows": (lambda a: fastnorm.BatchNorm1d(6, activation=a), (9, 6)),
    "batch, frozen": (lambda a: fastnorm.BatchNorm2d(6, activation=a).eval(), (3, 6, 5, 7)),
    "group": (lambda a: fastnorm.GroupNorm(2, 6, activation=a), (3, 6, 5, 7)),
    "instance": (
        lambda a: fastnorm.InstanceNorm2d(6, affine=True, track_running_stats=True, activation=a), (3, 6, 5, 7)
    ),
    "instance, no batch": (lambda a: fastnorm.InstanceNorm1d(6, activation=a), (6, 9)),
    "layer": (lambda a: fastnorm.LayerNorm(7, activation=a), (3, 6, 5, 7)),
    "layer, channels": (lambda a: fastnorm.LayerNorm2d(6, activation=a), (3, 6, 5, 7)),
    "rms": (lambda a: fastnorm.RMSNorm((5, 7), activation=a), (3, 6, 5, 7)),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("make, shape", NORMS.values(), ids=NORMS)
def test_norms(backend, make, shape, layout):
    """What is made again has the same bits, in every dtype, on every backend."""
    if backend.small and layout == "channels_last":
        pytest.skip("one layout is enough to see that the emulated kernels repeat themselves")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype in dtypes[:1] if backend.small else dtypes:
        for activation in ("silu",) if backend.small else (None, "silu"):
            norm = make(activation).to(backend.device, dtype)
            x = to_layout(torch.randn(shape, dtype=dtype, device=backend.device) * 3 + 1, layout).requires_grad_()
            y, sums = norm(x), norm(x, x)
            state = {n: b.clone() for n, b in norm.named_buffers()}
            with save_memory():
                z = norm(x)
                w = z * z  # which keeps z
                with_residual = norm(x, x)
                v = with_residual * with_residual
            assert torch.equal(y, z) and torch.equal(sums, with_residual)
            assert all(torch.equal(w.grad_fn._saved_self.detach(), y.detach()) for _ in range(2))
            assert torch.equal(v.grad_fn._saved_self.detach(), sums.detach())
            if norm.training and state:
                assert all(not torch.equal(b, state[n]) for n, b in norm.named_buffers() if "running" in n)
            again = {n: b.clone() for n, b in norm.named_buffers()}
            w.sum().backward()
            assert all(torch.equal(b, again[n]) for n, b in norm.named_buffers())


def test_add_layer_norm():
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 4, 9, dtype=dtype)
        a.requires_grad_()
        with save_memory():
            y, _ = fastnorm.functional.add_layer_norm(a, b, (9,), activation="gelu")
            w = y * y
        assert torch.equal(w.grad_fn._saved_self.detach(), y.detach())


def test_whatever_keeps_it():
    """Views, several users, a linear layer, pooling, an output that is used after an in-place change."""

    class Net(nn.Module):
        def __init__(self, end):
            super().__init__()
            self.norm, self.end = fastnorm.BatchNorm2d(4, activation="silu"), end
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False)
            self.linear = nn.Linear(100, 3)

        def forward(self, x):
            return self.end(self, self.norm(x))

    ends = {
        "two": lambda m, y: m.a(y) + m.b(y) * m.b(y), "flatten": lambda m, y: m.linear(y.flatten(1)),
        "slice": lambda m, y: m.a(y[1:, :, 1:, :4]), "pool": lambda m, y: F.max_pool2d(y, 2) + F.avg_pool2d(y, 2),
        "changed": lambda m, y: m.a(y.mul_(2)), "changed between": lambda m, y: m.a(y + 0) + m.b(y.add_(1)),
        "transposed": lambda m, y: m.a(y.transpose(2, 3)), "itself": lambda m, y: y * y,
    }  # fmt: skip
    for end in ends.values():
        net = Net(end)
        saving = Saving(copy.deepcopy(net))
        x = torch.randn(3, 4, 5, 5)
        for m in (net, saving):
            for p in m.parameters():
                p.grad = torch.zeros_like(p)
        out = []
        for m in (net, saving):
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            y.square().sum().backward()
            out.append([y.detach(), leaf.grad, *(p.grad for p in m.parameters())])
        assert_equal(*out)


def test_graph_used_twice_and_second_derivatives():
    """Of a chain of residual blocks too."""
    blocks = nn.Sequential(nn.Conv2d(3, 4, 1), *(ResidualBlock(4, 4) for _ in range(3)))
    for model in (conv_stack(depth=3, act=nn.SiLU), blocks):
        twice(fastnorm.fuse(model).double())


def twice(model):
    saving = Saving(copy.deepcopy(model))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    out = []
    for m in (model, saving):
        leaf = x.clone().requires_grad_()
        y = m(leaf).square().sum()
        first = torch.autograd.grad(y, leaf, retain_graph=True)[0]
        second = torch.autograd.grad(y, leaf, create_graph=True)[0]
        torch.testing.assert_close(first, second)  # a graph of the gradients has torch's own convolutions
        third = torch.autograd.grad(second.square().sum(), leaf)[0]
        out.append([first, third])
    assert_equal(*out)


def test_changes_in_place_are_still_errors():
    """What autograd notices without save_memory, it notices with it."""
    norm, conv = fastnorm.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
    for change in ("x", "weight", "other"):
        x = torch.randn(2, 4, 5, 5, requires_grad=True) * 1
        with save_memory():
            loss = conv(norm(x)).square().sum()
            other = (x * 1).exp()
            loss = loss + other.sum()
        with torch.no_grad():
            {"x": x, "weight": norm.weight, "other": other}[change].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_memory_is_free_as_soon_as_nobody_needs_it():
    """Neither the recorder nor a recipe keeps what torch would have let go."""
    norm = fastnorm.BatchNorm2d(4)
    with save_memory():
        x = torch.randn(2, 4, 5, 5, requires_grad=True) * 1
        weak = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
        y = norm(x)
        del x
        assert not weak.expired()
        del y
        gc.collect()
        assert weak.expired()


def test_within_other_hooks():
    """save_on_cpu around it gets what is kept, and counts of bytes see it."""
    model = fastnorm.fuse(conv_stack())
    x = torch.randn(2, 3, 8, 8)
    expected = results(copy.deepcopy(model), x)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(results(Saving(copy.deepcopy(model)), x), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert_equal(results(Saving(model), x), expected)


def test_checkpoint_and_no_grad():
    model = fastnorm.fuse(conv_stack())
    x = torch.randn(2, 3, 8, 8)
    expected = results(copy.deepcopy(model), x)

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            with save_memory():
                return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)

    assert_equal(results(Checkpointed(copy.deepcopy(model)), x), expected)
    with torch.no_grad(), save_memory():
        assert torch.equal(model.eval()(x), model(x))
    assert importlib.import_module("fastnorm._recipes").recorder() is None


def test_argument_of_fuse():
    model = ResidualNet()
    twin = copy.deepcopy(model)
    fastnorm.fuse(model, save_memory=True)
    fastnorm.fuse(twin)
    x = torch.randn(2, 3, 16, 16)
    assert saved_bytes(model, x) < saved_bytes(twin, x)
    assert_same(train(model), train(twin), rtol=0, atol=0)
    other = copy.deepcopy(model)
    assert saved_bytes(other, x) == saved_bytes(model, x)
    fastnorm.revert(model)
    assert type(model) is ResidualNet
    plain = nn.Sequential(fastnorm.LayerNorm(4), nn.Linear(4, 4))
    bytes_before = saved_bytes(plain, torch.randn(3, 4, requires_grad=True))
    fastnorm.fuse(plain, save_memory=True)
    assert saved_bytes(plain, torch.randn(3, 4, requires_grad=True)) < bytes_before


def test_autocast():
    model = fastnorm.fuse(UNet())
    saving, x = Saving(copy.deepcopy(model)), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(results(model, x), results(saving, x))


def test_compiled():
    torch.compiler.reset()
    model = fastnorm.fuse(conv_stack(depth=2), save_memory=True)
    x = torch.randn(2, 3, 8, 8)
    expected = results(copy.deepcopy(model), x)
    for a, b in zip(results(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected, strict=True):
        assert_same(a, b)


def test_networks_of_fastnorm():
    model = models.resnet18(num_classes=3, small_images=True)
    x = torch.randn(2, 3, 16, 16)
    assert saved_bytes(Saving(model), x) < 0.65 * saved_bytes(model, x)
    saving = Saving(copy.deepcopy(model))
    assert_equal(results(model, x), results(saving, x))


def test_documentation():
    module = importlib.import_module("fastnorm.save_memory")
    assert doctest.testmod(module, extraglobs={"nn": nn, "torch": torch, "fastnorm": fastnorm}).failed == 0
