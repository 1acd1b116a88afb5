"""Whether fastnorm is right on this machine: gradients, operators, agreement with torch, error against float64.

A further operator adds itself to CHECKS by one :class:`OpCheck`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import ops
from .activation import ACTIVATIONS, activate
from .batch_norm import batch_norm

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One way to call an operator: the same inputs for fastnorm's function and for torch's."""

    name: str
    inputs: tuple[Tensor, ...]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]


@dataclass(frozen=True)
class OpCheck:
    """What there is to check of an operator.

    Attributes:
        cases: (device, dtype) -> Cases whose inputs are differentiable.
        operators: (device, dtype) -> (operator, arguments) for torch.library.opcheck.
    """

    cases: Callable[[str, torch.dtype], Iterable[Case]]
    operators: Callable[[str, torch.dtype], Iterable[tuple[object, tuple]]]


@dataclass
class Row:
    op: str
    device: str
    dtype: str
    check: str
    cases: int
    worst: str
    failure: str = ""


def _batch_norm_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    c = 5
    for activation, residual, training, layout in itertools.product(
        (None, *ACTIVATIONS), (False, True), (True, False), ("planes", "channels_last")
    ):
        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def tensor(*shape: int, format: torch.memory_format = torch.contiguous_format) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype).contiguous(memory_format=format)

        inputs = (tensor(4, c, 3, 5, format=format), tensor(c), tensor(c))
        if residual:
            inputs += (tensor(4, c, 3, 5, format=format),)
        running = (tensor(c), tensor(c).square() + 0.5)

        # Copies, as functional and double differentiation call this many times.
        def function(x, weight, bias, residual=None, training=training, activation=activation, running=running):
            mean, var = (t.clone() for t in running)
            return batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=residual)

        def reference(x, weight, bias, residual=None, training=training, activation=activation, running=running):
            mean, var = (t.to(x.dtype, copy=True) for t in running)
            z = F.batch_norm(x, mean, var, weight, bias, training)
            return activate(z if residual is None else z + residual, activation, 0.01)

        mode = "training" if training else "evaluation"
        name = f"{mode} {layout} {activation}{' residual' if residual else ''}"
        yield Case(name, inputs, function, reference)


def _batch_norm_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, residual, dy = (torch.randn(4, 5, 3, 3, device=device, dtype=dtype) for _ in range(3))
    weight, bias, mean = (torch.randn(5, device=device, dtype=dtype) for _ in range(3))
    var, count = mean.square() + 0.5, torch.zeros((), dtype=torch.long, device=device)
    for training in (True, False):
        forward = (x, residual, weight, bias, mean, var, count, training, 0.1, 1e-5, "silu", 0.01, False)
        operator = ops.batch_norm_forward.default if training else ops.batch_norm_forward.frozen
        _, stats, mask = operator(*forward)
        yield operator, forward
        backward = (dy, x, residual, weight, bias, stats, mask, training, 1e-5, "silu", 0.01, [True] * 4)
        yield ops.batch_norm_backward.default, backward


CHECKS: dict[str, OpCheck] = {"batch_norm": OpCheck(_batch_norm_cases, _batch_norm_operators)}


def _gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = function(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def _error(result: Tensor, exact: Tensor) -> float:
    difference = (result.double() - exact).abs().max().item()
    return difference / max(exact.abs().max().item(), 1e-30) if math.isfinite(difference) else math.inf


def _check_gradients(case: Case, second: bool) -> float:
    inputs = tuple(t[:2, :, :2, :2] if t.dim() > 1 else t for t in case.inputs)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    check(case.function, inputs, fast_mode=True)
    return 0.0


def _check_accuracy(case: Case) -> float:
    """fastnorm's error against float64, in units of what is allowed: twice torch's own and a few roundings."""
    dtype = case.inputs[0].dtype
    exact_inputs = tuple(t.double() for t in case.inputs)
    dy = torch.randn_like(exact_inputs[0])
    exact = _gradients(case.reference, exact_inputs, dy.to(dtype).double())
    ours = _gradients(case.function, case.inputs, dy.to(dtype))
    torchs = _gradients(case.reference, case.inputs, dy.to(dtype))
    floor = (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    worst = 0.0
    for result, other, truth in zip(ours, torchs, exact, strict=True):
        share = _error(result, truth) / (2 * _error(other, truth) + floor)
        worst = max(worst, share)
    if worst > 1:
        raise AssertionError(f"the error is {worst:.1f} times what torch's own allows")
    return worst


def _plan(
    op: str, device: str, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[str, str, list[Callable[[], float]]]]:
    """(dtype, check, its calls) of one operator on one device."""
    found = CHECKS[op]
    if torch.float64 in dtypes:
        cases = list(found.cases(device, torch.float64))
        yield "float64", "gradcheck", [lambda c=c: _check_gradients(c, False) for c in cases]
        yield "float64", "gradgradcheck", [lambda c=c: _check_gradients(c, True) for c in cases]
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        calls = [lambda c=c: _check_accuracy(c) for c in found.cases(device, dtype)]
        yield name, "error / allowed", calls
    dtype = dtypes[0] if torch.float32 not in dtypes else torch.float32
    name = str(dtype).removeprefix("torch.")

    def run_opcheck(operator: object, arguments: tuple) -> float:
        torch.library.opcheck(operator, arguments)
        return 0.0

    yield name, "opcheck", [lambda o=o, a=a: run_opcheck(o, a) for o, a in found.operators(device, dtype)]


def check(*op: str, device: str | None = None, dtype: str | None = None) -> bool:
    """Checks fastnorm on this machine and prints a table.

    gradcheck and gradgradcheck in float64, torch.library.opcheck, and in every dtype the error of results and gradients
    against float64, which may be twice torch's own error.

    Args:
        op: names of operators, such as "batch_norm"; all by default.
        device: "cpu" or "cuda"; by default each that is there.
        dtype: "float64", "float32", "float16" or "bfloat16"; all by default.

    Returns:
        Whether everything passed.

    Raises:
        ValueError: for an unknown operator or dtype, or a device that is not there.

    Example:
        >>> check("batch_norm", dtype="float32", device="cpu")  # doctest: +SKIP
        True
    """
    if unknown := [name for name in op if name not in CHECKS]:
        raise ValueError(f"check: op must be one of {', '.join(CHECKS)}, got {unknown[0]}")
    dtypes = tuple(t for t in DTYPES if dtype in (None, str(t).removeprefix("torch.")))
    if not dtypes:
        raise ValueError(f"check: dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"check: device must be one that is there, got {device}")
    devices = (device,) if device else ("cpu", "cuda") if torch.cuda.is_available() and _built_for_cuda() else ("cpu",)
    rows = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plan = [
            (name, where, *step) for name in op or CHECKS for where in devices for step in _plan(name, where, dtypes)
        ]
        with _Progress(sum(len(step[-1]) for step in plan)) as advance:
            for name, where, dtype_name, kind, calls in plan:
                row = Row(name, where, dtype_name, kind, len(calls), "")
                worst = 0.0
                for call in calls:
                    try:
                        worst = max(worst, call())
                    except Exception as problem:  # whatever is wrong belongs in the table
                        row.failure = (
                            row.failure or f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}"
                        )
                    advance()
                row.worst = f"{worst:.2f}" if kind.startswith("error") else ""
                rows.append(row)
    _print_table(rows)
    return not any(row.failure for row in rows)


def _built_for_cuda() -> bool:
    from ._info import info

    return info()["cuda"] is not None


class _Progress:
    """tqdm's bar where it is installed and someone watches; else nothing."""

    def __init__(self, total: int) -> None:
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, desc="check", leave=False)

    def __enter__(self) -> Callable[[], object]:
        return self.bar.update if self.bar is not None else lambda: None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _print_table(rows: list[Row]) -> None:
    lines = [("op", "device", "dtype", "check", "cases", "worst", "")]
    for r in rows:
        lines.append(
            (r.op, r.device, r.dtype, r.check, str(r.cases), r.worst, (r.failure and f"FAILED {r.failure}") or "ok")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    for line in lines:
        print("  ".join([*(f"{cell:{w}}" for cell, w in zip(line, widths, strict=False)), line[6]]).rstrip())
