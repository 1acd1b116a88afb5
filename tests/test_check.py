"""fastnorm.check() and python -m fastnorm check."""

import dataclasses

import pytest
import torch

import fastnorm
from fastnorm.__main__ import main
from fastnorm._check import CHECKS, Case


def test_passes_and_prints_a_table(capsys):
    assert main(["check", "batch_norm", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", "device", "dtype", "check", "cases", "worst"]
    assert len(lines) == 3 and all(line.endswith("ok") for line in lines[1:])


def test_a_wrong_operator_is_found(capsys, monkeypatch):
    good = CHECKS["batch_norm"]

    def broken(device, dtype):
        case = next(iter(good.cases(device, dtype)))
        yield Case("wrong", case.inputs, lambda *a: case.function(*a) * 1.01, case.reference)

    wrong = dataclasses.replace(good, cases=broken)
    monkeypatch.setitem(CHECKS, "batch_norm", wrong)
    assert main(["check", "--dtype", "float32", "--device", "cpu"]) == 1
    assert "FAILED AssertionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nothing",), "op must be one of avg_pool2d, batch_norm"),
        ((), "dtype must be"),
        ((), "device must be one that is there"),
    ],
)
def test_wrong_arguments(arguments, message):
    keywords = {"dtype": "int8"} if "dtype" in message else {"device": "cuda:99"} if "device" in message else {}
    if "device" in message and torch.cuda.is_available():
        keywords = {"dtype": "float8"}
        message = "dtype must be"
    with pytest.raises(ValueError, match=message):
        fastnorm.check(*arguments, **keywords)


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    fastnorm.check("batch_norm", device="cpu", dtype="float16")
    assert torch.equal(before, torch.get_rng_state())
