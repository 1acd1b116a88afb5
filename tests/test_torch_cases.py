"""The cases that torch publishes for its own norms (torch.testing._internal), run on fastnorm's."""

import copy
import inspect
import itertools

import pytest
import torch
from conftest import to_layout

import fastnorm

pytest.importorskip("expecttest", reason="torch's own cases import expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

# Of fastnorm's layers those that torch has cases for, which it has not for what needs several processes.
MODULES = {m.module_cls.__name__: m.module_cls for m in module_db if m.module_cls.__name__ in fastnorm.layers.__all__}
MODULES = {name: getattr(fastnorm, name) for name in MODULES}
FUNCTIONS = {
    name: op for op in op_db if (name := op.name.removeprefix("nn.functional.")) in fastnorm.functional.__all__
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = {t: torch.float64 if t.itemsize == 2 else t for t in DTYPES}


def tolerance(dtype):
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


def narrowed(t, dtype):
    return t.to(dtype) if t.is_floating_point() else t


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
        has_parameters = "device" in inspect.signature(getattr(torch.nn, name)).parameters
        x = to_layout(case.forward_input.args[0].detach().to(backend.device), layout)
        results, initial = [], None
        # torch rounds partial sums of 16-bit parameters' gradients: in 16 bits its side is computed in float64.
        for cls, wide in ((MODULES[name], dtype), (getattr(torch.nn, name), WIDE[dtype])):
            factory = {"device": backend.device, "dtype": wide} if has_parameters else {}
            module = cls(*arguments, **keywords | factory).train(training)
            initial = initial or copy.deepcopy(module.state_dict())  # random of convolutions
            module.load_state_dict(initial)
            leaf = x.to(wide, copy=True).requires_grad_()
            y, *others = outputs if isinstance(outputs := module(leaf), tuple) else (outputs,)
            y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(dtype).to(wide))
            gradients = [leaf.grad, *(p.grad for p in module.parameters())]
            state = [narrowed(t, dtype) for t in module.state_dict().values()]
            results.append((y.detach().to(dtype), others, [g.to(dtype) for g in gradients], state))
        torch.testing.assert_close(*results, rtol=tolerance(dtype), atol=tolerance(dtype))
        ran += 1
    assert ran > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(backend, name, dtype):
    samples = list(FUNCTIONS[name].sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        results = []
        # As above, torch's side of 16 bits is computed in float64.
        for package, wide in ((fastnorm, dtype), (torch.nn, WIDE[dtype])):
            tensors = []

            def take(t, tensors=tensors, wide=wide):
                if not isinstance(t, torch.Tensor):
                    return t
                to = wide if t.is_floating_point() else t.dtype
                tensors.append(t.detach().to(backend.device, to, copy=True).requires_grad_(t.requires_grad))
                return tensors[-1]

            x, args = take(sample.input), [take(t) for t in sample.args]
            y = getattr(package.functional, name)(x, *args, **{k: take(t) for k, t in sample.kwargs.items()})
            leaves = [t for t in tensors if t.requires_grad]
            y, *others = y if isinstance(y, tuple) else (y,)
            gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True) if y.numel() else ()
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=False)]
            rest = [*others, *(t for t in tensors if not t.requires_grad)]
            results.append([t.detach() for t in (y, *gradients, *rest)])
        ours, theirs = results
        theirs = [narrowed(t, dtype) for t in theirs]
        torch.testing.assert_close(ours, theirs, rtol=tolerance(dtype), atol=tolerance(dtype))


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
