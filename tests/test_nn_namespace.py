"""``import fastnorm.nn as nn`` in place of torch.nn."""

import importlib
import subprocess
import sys

import pytest
import torch

import fastnorm
import fastnorm.nn as nn

OURS = {*fastnorm.layers.__all__} - {"LayerNorm2d"}  # which torch.nn has not


def test_every_other_name_is_torchs_own():
    for name in dir(torch.nn):
        if name.startswith("__") or name == "functional":
            continue
        same = getattr(nn, name) is getattr(torch.nn, name)
        assert same != (name in OURS), name
    for name in OURS:
        assert getattr(nn, name) is getattr(fastnorm, name)
        assert issubclass(getattr(nn, name), getattr(torch.nn, name))


def test_functional():
    assert nn.functional.batch_norm is fastnorm.functional.batch_norm
    for name in dir(torch.nn.functional):
        if not name.startswith("__") and name not in fastnorm.functional.__all__:
            assert getattr(nn.functional, name) is getattr(torch.nn.functional, name), name


@pytest.mark.parametrize(
    "name", ["init", "utils", "utils.rnn", "utils.parametrizations", "parallel", "modules.batchnorm"]
)
def test_submodules_are_torchs_own(name):
    before = importlib.import_module(f"torch.nn.{name}")
    specification = before.__spec__
    assert importlib.import_module(f"fastnorm.nn.{name}") is before
    assert importlib.import_module(f"torch.nn.{name}") is before and before.__spec__ is specification


def test_names_that_are_nowhere():
    with pytest.raises(AttributeError, match=r"fastnorm\.nn.* has no attribute 'Nothing'"):
        nn.Nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"fastnorm\.nn\.functional.* has no attribute 'nothing'"):
        nn.functional.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fastnorm.nn.nothing")
    with pytest.raises(ImportError):
        exec("from fastnorm.nn import nothing")


def test_a_model_file_with_that_one_line(subprocess_environment):
    program = """
import fastnorm.nn as nn
import fastnorm.nn.functional as F
from fastnorm.nn import Conv2d, BatchNorm2d, Module
from fastnorm.nn.utils import clip_grad_norm_
from fastnorm.nn.utils.rnn import pad_sequence
import torch, torch.nn, fastnorm.nn.init as init
class Net(Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Conv2d(1, 4, 3), BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    def forward(self, x):
        return F.log_softmax(self.body(x), -1)
net = Net()
loss = F.nll_loss(net(torch.randn(5, 1, 8, 8)), torch.tensor([0, 1, 2, 0, 1]))
loss.backward()
init.kaiming_normal_(net.body[0].weight)
clip_grad_norm_(net.parameters(), 1.0)
assert isinstance(net, torch.nn.Module) and type(net.body[1]).__module__.startswith("fastnorm")
namespace = {}
exec("from fastnorm.nn import *", namespace)
assert namespace["BatchNorm2d"] is BatchNorm2d and namespace["Linear"] is torch.nn.Linear
"""
    result = subprocess.run([sys.executable, "-c", program], env=subprocess_environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
