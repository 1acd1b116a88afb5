"""Whether fastnorm is right on this machine: gradients, operators, agreement with torch, error against float64.

What is checked of each operator is in _check_cases.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._check_cases import CHECKS, Case

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Row:
    op: str
    device: str
    dtype: str
    check: str
    cases: int
    worst: str
    failure: str = ""


def _gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = function(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def _error(result: Tensor, exact: Tensor) -> float:
    difference = (result.double() - exact).abs().max().item()
    return difference / max(exact.abs().max().item(), 1e-30) if math.isfinite(difference) else math.inf


def _check_gradients(case: Case, second: bool) -> float:
    inputs = tuple(t[case.small] if t.dim() > 1 else t for t in case.inputs)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    check(case.function, inputs, fast_mode=True)
    return 0.0


def _check_accuracy(case: Case) -> float:
    """fastnorm's error against float64, in units of what is allowed: twice torch's own and a few roundings."""
    dtype = case.inputs[0].dtype
    exact_inputs = tuple(t.double() for t in case.inputs)
    with torch.no_grad():
        dy = torch.randn_like(case.reference(*exact_inputs))
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
    if torch.float64 in dtypes and (cases := list(found.cases(device, torch.float64))):
        yield "float64", "gradcheck", [lambda c=c: _check_gradients(c, False) for c in cases]
        yield "float64", "gradgradcheck", [lambda c=c: _check_gradients(c, True) for c in cases]
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if calls := [lambda c=c: _check_accuracy(c) for c in found.cases(device, dtype)]:
            yield name, "error / allowed", calls
        if calls := [lambda f=f: f() or 0.0 for f in found.exact(device, dtype)]:
            yield name, "exact results", calls
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
