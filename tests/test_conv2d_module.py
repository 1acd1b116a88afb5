"""Conv2d as a drop-in module: arguments, repr, state, copies, padding modes, tracing, conversion."""

import copy
import pickle

import pytest
import torch
from oracle import error
from torch import nn

import fastnorm

ARGUMENTS = [
    ((4, 6, 3), {}),
    ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 2), "dilation": 2, "groups": 2, "bias": False}),
    ((4, 8, 1), {"padding": "same"}),
    ((4, 4, 4), {"padding": "same", "dilation": (1, 2)}),
    ((4, 6, 3), {"padding": "valid"}),
    *(((4, 6, 3), {"padding": (2, 1), "padding_mode": mode}) for mode in ("reflect", "replicate", "circular")),
    ((4, 6, 2), {"padding": "same", "padding_mode": "circular"}),
]


def twins(*arguments, **keywords):
    torch.manual_seed(0)
    ours = fastnorm.Conv2d(*arguments, **keywords)
    torch.manual_seed(0)
    return ours, nn.Conv2d(*arguments, **{k: v for k, v in keywords.items() if k != "activation"})


@pytest.mark.parametrize("arguments, keywords", ARGUMENTS)
def test_is_torchs(backend, arguments, keywords):
    ours, theirs = (m.to(backend.device) for m in twins(*arguments, **keywords))
    assert isinstance(ours, nn.Conv2d) and repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    x = torch.randn(2, 4, 9, 8, device=backend.device)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(module) == repr(theirs)
        for batch in (x, x[0]):
            assert error(module(batch), theirs(batch)) < 1e-5
    theirs.load_state_dict(ours.state_dict()), ours.load_state_dict(theirs.state_dict())


def test_activation(backend):
    ours, theirs = (m.to(backend.device) for m in twins(4, 6, 3, activation="relu"))
    assert repr(ours) == repr(theirs)[:-1] + ", activation='relu')"
    x = torch.randn(2, 4, 9, 8, device=backend.device)
    assert error(ours(x), theirs(x).relu()) < 1e-5
    with pytest.raises(ValueError, match="activation must be"):
        fastnorm.Conv2d(4, 6, 3, activation="swish")


def test_subclasses_may_replace_the_weight():
    """torch's extension point, which weight norms and quantisation use."""
    ours, theirs = twins(4, 6, 3, activation="relu")
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3)
    assert error(ours._conv_forward(x, weight, None), theirs._conv_forward(x, weight, None).relu()) < 1e-5
    normed = nn.utils.parametrizations.weight_norm(ours)
    normed(x).sum().backward()
    assert normed.parametrizations.weight.original0.grad is not None


def test_symbolic_trace():
    model = nn.Sequential(fastnorm.Conv2d(3, 4, 3, activation="relu"), fastnorm.Conv2d(4, 2, 1))
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(x), model(x))


def test_convert_and_revert():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding_mode="reflect", padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 12, 12)
    expected, parameters = model(x), list(model.parameters())
    fastnorm.convert(model)
    assert type(model[0]) is fastnorm.Conv2d and type(model[2]) is fastnorm.Conv2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert error(model(x), expected) < 1e-5
    fastnorm.revert(model)
    assert type(model[0]) is nn.Conv2d and torch.equal(model(x), expected)


def test_trains_like_torchs(backend):
    ours, theirs = (nn.Sequential(m, nn.Flatten(), nn.LazyLinear(3)).to(backend.device) for m in twins(2, 4, 3))
    x, target = torch.randn(8, 2, 6, 6, device=backend.device), torch.randint(3, (8,), device=backend.device)
    ours(x), theirs(x)
    theirs.load_state_dict(ours.state_dict())
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1]
