"""fastnorm.models: torchvision's keys, outputs and initialisation, arguments, errors, forms."""

import doctest
import importlib
import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import fastnorm
from benchmarks.twins import NAMES, twin
from fastnorm import models

NUMERIC = {
    "alexnet": 32, "vgg11_bn": 32, "googlenet": 32, "resnet18": 32, "resnext50_32x4d": 32,
    "densenet121": 32,
}  # fmt: skip
SMALLEST = {"alexnet": (63, 15), "nin": (67, 15), "vgg11": (32, 32), "googlenet": (15, 8), "densenet121": (29, 8)}
SHALLOW = ("lenet", "lenet_bn", "alexnet", "vgg11_bn", "nin", "googlenet", "resnet18", "densenet121")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = models.create(name).state_dict(), twin(name).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name, size", NUMERIC.items())
def test_outputs_of_torchvisions_state_dict(name, size):
    """Training and evaluation, gradients and running statistics, with what a strict load took."""
    theirs = twin(name, 5, small=True).double()
    arguments = {"init_weights": False} if name == "googlenet" else {}
    ours = models.create(name, num_classes=5, small_images=True, **arguments).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for m in (*ours.modules(), *theirs.modules()):
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    losses = []
    for m in (ours, theirs):
        y = m.train()(x)
        y = torch.cat(y, 1) if isinstance(y, tuple) else y
        losses.append(y.square().mean())
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert grads
    for n, p in ours.named_parameters():
        if n in grads:
            torch.testing.assert_close(p.grad, grads[n], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet"])
def test_full_size_stem(name):
    """The 7x7 convolution and the pooling after it, in evaluation."""
    theirs = twin(name, 5).eval()
    ours = models.create(name, num_classes=5, **({"init_weights": False} if name == "googlenet" else {})).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_published_densenet_keys():
    """torchvision's files write denselayer1.norm.1 for what its class calls denselayer1.norm1."""
    with torch.device("meta"):
        model = models.densenet121()
    state = OrderedDict()
    for key, value in model.state_dict().items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        state[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in state and "features.transition1.norm.weight" in state
    assert models.densenet121.__name__ == "densenet121"
    model.load_state_dict(state, strict=True, assign=True)
    nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{k}": v for k, v in state.items()}, assign=True)


def test_auxiliary_heads():
    model = models.googlenet(num_classes=5, init_weights=False)
    y = model(torch.randn(2, 3, 32, 32))
    assert type(y).__name__ == "GoogLeNetOutputs" and [tuple(t.shape) for t in y] == [(2, 5)] * 3
    assert y.logits is y[0] and y.aux_logits2 is y[1] and y.aux_logits1 is y[2]
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    plain = models.googlenet(num_classes=5, init_weights=False, aux_logits=False)
    assert plain(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert not [k for k in plain.state_dict() if k.startswith("aux")]
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aux")}, strict=True)
    changed = models.googlenet(num_classes=5, init_weights=False, transform_input=True).eval()
    changed.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    scale, shift = torch.tensor([0.229, 0.224, 0.225]) / 0.5, (torch.tensor([0.485, 0.456, 0.406]) - 0.5) / 0.5
    expected = model(x * scale.view(3, 1, 1) + shift.view(3, 1, 1))
    torch.testing.assert_close(changed(x), expected)


@pytest.mark.parametrize("name", SHALLOW)
def test_classes_channels_and_small_images(name):
    lenet = name.startswith("lenet")
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    arguments |= {} if lenet else {"small_images": True}
    model = models.create(name, num_classes=7, in_channels=2, **arguments)
    x = torch.randn(2, 2, 28, 28) if lenet else torch.randn(2, 2, 32, 32)
    assert model(x).shape == (2, 7)
    assert torch.isfinite(model.eval()(x)).all()


NORMS = {
    "group": lambda c: fastnorm.GroupNorm(1 if c % 2 else 2, c), "torch": nn.BatchNorm2d,
    "instance": partial(fastnorm.InstanceNorm2d, affine=True), "layer": fastnorm.LayerNorm2d,
    "sync": fastnorm.SyncBatchNorm,
}  # fmt: skip
EVERY = ("alexnet", "vgg11", "nin", "googlenet", "resnet18", "densenet121", "lenet")


@pytest.mark.parametrize(
    "name, norm", [(n, m) for n in EVERY for m in ("torch", "group")] + [("resnet18", m) for m in NORMS], ids=str
)
def test_norm_layers(name, norm):
    """Any callable; a norm of fastnorm's ends with the activation in its own call, another one gets a ReLU after it."""
    arguments = {
        "lenet": {"image_size": 32, "activation": "relu"},
        "googlenet": {"small_images": True, "aux_logits": False, "init_weights": False},
    }.get(name, {"small_images": True})
    model = models.create(name, num_classes=3, in_channels=3, norm_layer=NORMS[norm], **arguments)
    norms = [m for m in model.modules() if isinstance(m, type(NORMS[norm](4)))]
    assert norms
    seen = []
    for m in norms:
        m.register_forward_hook(lambda m, args, y: seen.append(y.min().item()))
    x = torch.randn(2, 3, 64, 64) if norm == "instance" else torch.randn(2, 3, 32, 32)
    if name == "lenet":
        x = x[..., :32, :32]
    with torch.no_grad():
        y = model.eval()(x)
    assert y.shape == (2, 3) and torch.isfinite(y).all()
    shortcuts = 3 if name == "resnet18" else 0
    negative = sum(low < 0 for low in seen)
    assert negative >= len(norms) - 1 if norm == "torch" else negative == shortcuts


def test_same_network_with_torchs_norms():
    """The fused calls against torch's norms and a ReLU of their own."""
    for name in ("resnet18", "vgg11_bn", "densenet121"):
        ours = models.create(name, num_classes=3, small_images=True).double().eval()
        theirs = models.create(name, num_classes=3, small_images=True, norm_layer=nn.BatchNorm2d).double().eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert not any(isinstance(m, fastnorm.BatchNorm2d) for m in theirs.modules())
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


def test_lenet_in_three_forms():
    """A Module, a Sequential, a Sequential of named layers: the same result from the same weights."""
    for arguments in (
        {}, {"activation": "relu", "pooling": "max"}, {"in_channels": 3, "image_size": 32, "num_classes": 4},
        {"norm_layer": fastnorm.BatchNorm2d, "norm_layer_1d": fastnorm.BatchNorm1d, "activation": "relu"},
        {"norm_layer": nn.BatchNorm2d},
    ):  # fmt: skip
        module = models.lenet(**arguments)
        named, plain = models.lenet_named(**arguments), models.lenet_sequential(**arguments)
        named.load_state_dict(module.state_dict(), strict=True)
        plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)), strict=True)
        size = arguments.get("image_size", 28)
        x = torch.randn(3, arguments.get("in_channels", 1), size, size)
        assert type(named) is type(plain) is nn.Sequential
        for training in (True, False):
            y = module.train(training)(x)
            assert torch.equal(named.train(training)(x), y) and torch.equal(plain.train(training)(x), y)
    assert [type(m).__name__ for m in models.lenet_sequential()][:3] == ["Conv2d", "Sigmoid", "AvgPool2d"]


def test_initialisation():
    """As torchvision's: the standard deviations of its rules."""
    model = models.resnet18(zero_init_residual=True)
    w = model.layer4[0].conv1.weight
    assert abs(w.std() - math.sqrt(2 / (512 * 9))) < 1e-3
    assert model.layer1[0].bn2.weight.eq(0).all() and model.layer1[0].bn1.weight.eq(1).all()
    model = models.vgg11(small_images=True)
    assert abs(model.classifier[0].weight.std() - 0.01) < 1e-3 and model.features[0].bias.eq(0).all()
    assert abs(model.features[8].weight.std() - math.sqrt(2 / (256 * 9))) < 1e-3
    model = models.vgg11(small_images=True, dropout=0.3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    model = models.densenet121(drop_rate=0.1, small_images=True)
    assert model.classifier.bias.eq(0).all() and model.features.denseblock1.denselayer1.dropout.p == 0.1
    model = models.googlenet()
    assert abs(model.inception5b.branch2[1].conv.weight.std() - 0.01) < 1e-3
    assert (model.dropout.p, model.aux1.dropout.p, model.conv1.bn.eps) == (0.2, 0.7, 0.001)


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_images(name):
    """The size that is named works, and one less would not."""
    for small, size in enumerate(SMALLEST[name]):
        with torch.device("meta"):
            arguments = {"aux_logits": False} if name == "googlenet" else {}
            model = models.create(name, small_images=bool(small), **arguments)
            assert model.smallest_image == size
            assert model.eval()(torch.empty(1, 3, size, size)).shape == (1, 1000)
            with pytest.raises(ValueError, match=rf"H and W at least {size}, got \(1, 3, {size - 1}, {size}\)"):
                model(torch.empty(1, 3, size - 1, size))
            model.smallest_image = 1
            try:
                model(torch.empty(1, 3, size - 1, size))
            except RuntimeError:
                continue
            assert name == "googlenet", "a smaller image works too"


@pytest.mark.parametrize("hooked", [nn.Conv2d, fastnorm.BatchNorm2d])
@pytest.mark.parametrize("name", ["lenet_bn", "vgg11_bn", "resnet18", "densenet121", "googlenet"])
def test_inference_leaves_what_hooks_saw(name, hooked, monkeypatch):
    """In inference norms write over the results of convolutions, but not where a hook may have kept one."""
    arguments = {
        "googlenet": {"init_weights": False, "aux_logits": False},
        "lenet_bn": {"in_channels": 3, "image_size": 32},
    }.get(name, {})
    if name != "lenet_bn":
        arguments["small_images"] = True
    model, x = models.create(name, num_classes=3, **arguments).eval(), torch.randn(2, 3, 32, 32)
    in_place, seen = [], []
    overwrite = fastnorm._C.batch_norm_inference_
    monkeypatch.setattr(fastnorm._C, "batch_norm_inference_", lambda x, *a: in_place.append(x) or overwrite(x, *a))

    def keep(module, args, y):
        seen.extend((t, t.clone()) for t in (args[0], y))

    norms = sum(isinstance(m, fastnorm.BatchNorm2d) for m in model.modules())
    expected = model(x).detach()  # with gradients, so that nothing is written over
    assert not in_place
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        # Of DenseNet the second ones of its layers and the first of all; the others read what later layers need.
        assert len(in_place) == (norms // 2 - 1 if name == "densenet121" else norms)
        in_place.clear()
        for module in model.modules():
            if isinstance(module, hooked):
                module.register_forward_hook(keep)
        assert torch.equal(model(x), expected)
    assert not in_place
    assert len(seen) >= 4 and all(torch.equal(now, then) for now, then in seen)


def test_inference_with_another_module_in_a_convolutions_place():
    """What it returns may be somebody else's, here the shortcut."""
    block, x = models.resnet18(small_images=True).layer1[0].eval(), torch.randn(2, 64, 8, 8)
    block.conv1 = nn.Identity()
    expected, before = block(x).detach(), x.clone()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert torch.equal(x, before)


def test_errors():
    with pytest.raises(ValueError, match=r"no 'resnet19': did you mean resnet18"):
        models.create("resnet19")
    with pytest.raises(AttributeError, match=r"no 'densenet12': did you mean densenet121"):
        models.densenet12  # noqa: B018
    with pytest.raises(ValueError, match="no 'x': there are lenet"):
        models.create("x")
    with pytest.raises(TypeError, match="classes"):
        models.resnet18(classes=3)
    with pytest.raises(ValueError, match="ResNet: num_classes must be a positive int, got 0"):
        models.resnet18(num_classes=0)
    with pytest.raises(ValueError, match=r"ResNet: the input must be \(N, 3, H, W\).*got \(2, 1, 32, 32\)"):
        models.resnet18(num_classes=3)(torch.empty(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"LeNet: the input must be .* got \(1, 28, 28\)"):
        models.lenet()(torch.empty(1, 28, 28))
    with pytest.raises(ValueError, match="LeNet: activation must be one of sigmoid, relu, tanh, got 'gelu'"):
        models.lenet(activation="gelu")
    with pytest.raises(ValueError, match="LeNet: image_size must be one of 28, 32, got 30"):
        models.lenet(image_size=30)
    with pytest.raises(ValueError, match="norm_layer must return a norm without an activation, got 'relu'"):
        models.resnet18(norm_layer=partial(fastnorm.BatchNorm2d, activation="relu"))
    with pytest.raises(TypeError, match="norm_layer must return a module"):
        models.resnet18(norm_layer=lambda c: c)
    with pytest.raises(ValueError, match="transform_input needs in_channels=3"):
        models.googlenet(in_channels=1, transform_input=True)
    assert set(models.names()) < set(models.__all__)
    for name in models.names():
        assert name in (getattr(models, name).__doc__ or "lenet_") or name.startswith("lenet_")


def test_compiled_and_converted():
    """One graph under torch.compile; nothing is left for fuse to do."""
    torch.compiler.reset()
    model = models.lenet_bn(activation="relu").eval()
    x = torch.randn(2, 1, 28, 28)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    model = models.resnet18(num_classes=3, small_images=True)
    assert not fastnorm.fuse(model).fuse_report.fused
    traced = torch.fx.symbolic_trace(models.resnet18(num_classes=3).eval())
    assert "call_module" in {n.op for n in traced.graph.nodes}


@pytest.mark.parametrize("family", ["", "resnet", "vgg", "alexnet", "nin", "googlenet", "densenet", "lenet"])
def test_documentation(family):
    module = importlib.import_module(f"fastnorm.models.{family}".rstrip("."))
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
