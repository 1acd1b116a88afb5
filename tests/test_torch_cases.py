"""The cases that torch publishes for its own batch norm (torch.testing._internal), run on fastnorm's."""

import itertools

import pytest
import torch
from conftest import to_layout

import fastnorm

pytest.importorskip("expecttest", reason="torch's own cases import expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

MODULES = {
    "BatchNorm1d": fastnorm.BatchNorm1d,
    "BatchNorm2d": fastnorm.BatchNorm2d,
    "BatchNorm3d": fastnorm.BatchNorm3d,
}
FUNCTION = next(op for op in op_db if op.name == "nn.functional.batch_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tolerance(dtype):
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


def module_cases(name, dtype, training):
    found = next(m for m in module_db if m.module_cls is getattr(torch.nn, name))
    requires_grad = True
    return found.module_inputs_func(found, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(backend, name, dtype, training):
    ran = 0
    for case, layout in itertools.product(module_cases(name, dtype, training), ("planes", "channels_last")):
        if case.forward_input is None:
            continue
        arguments, keywords = case.constructor_input.args, dict(case.constructor_input.kwargs)
        keywords |= {"device": backend.device, "dtype": dtype}
        x = to_layout(case.forward_input.args[0].detach().to(backend.device), layout)
        results = []
        for cls in (MODULES[name], getattr(torch.nn, name)):
            module = cls(*arguments, **keywords).train(training)
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(dtype))
            gradients = [leaf.grad, *(p.grad for p in module.parameters())]
            results.append((y.detach(), gradients, dict(module.state_dict())))
        torch.testing.assert_close(*results, rtol=tolerance(dtype), atol=tolerance(dtype))
        ran += 1
    assert ran > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function(backend, dtype):
    samples = list(FUNCTION.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        results = []
        for function in (fastnorm.functional.batch_norm, torch.nn.functional.batch_norm):

            def copy(t):
                t = t.detach().to(backend.device, copy=True) if isinstance(t, torch.Tensor) else t
                return t

            x, args, kwargs = (
                copy(sample.input),
                [copy(t) for t in sample.args],
                {k: copy(t) for k, t in sample.kwargs.items()},
            )
            leaves = [x, *(t for k, t in kwargs.items() if k in ("weight", "bias") and t is not None)]
            leaves += [t for t in args[2:4] if isinstance(t, torch.Tensor)]
            for leaf in leaves:
                leaf.requires_grad_()
            y = function(x, *args, **kwargs)
            gradients = torch.autograd.grad(y.sum(), leaves) if y.numel() else ()
            results.append((y.detach(), gradients, [t for t in args[:2] if t is not None]))
        torch.testing.assert_close(*results, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("name", MODULES)
def test_module_errors(name):
    found = next(m for m in module_db if m.module_cls is getattr(torch.nn, name))
    if found.module_error_inputs_func is None:
        return  # torch publishes none for this class
    for case in found.module_error_inputs_func(
        found, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            module = MODULES[name](*constructor.args, **constructor.kwargs)
            module(*forward.args, **forward.kwargs)
