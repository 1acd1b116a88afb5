"""What the norms' benchmarks share: their inputs, and how forward, backward and module calls are run on both sides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .common import Case

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# relu's slope where z is about 0 is decided by rounding: in a few elements the two sides differ rightly.  In 16 bits
# torch rounds the partial sums of parameters' gradients (0.2 off over 50176 rows of bfloat16), which fastnorm does not.
LOOSE = {"float64": 1e-2, "float32": 1e-2, "float16": 1e-1, "bfloat16": 5e-1}

# What to run: its name, "forward", "backward" or "both", the activation, and whether something is added.
Plan = tuple[tuple[str, str, str | None, bool], ...]


def theirs(run: Callable, function: Callable, against: list[str]) -> dict[str, Callable]:
    """What `run` does with torch's function, as it is and compiled."""
    made = {"eager": lambda: function, "compile": lambda: torch.compile(function, dynamic=False)}
    functions = {name: made[name]() for name in against}
    return {name: (lambda f=f: run(f)) for name, f in functions.items()}


@dataclass
class Bench:
    """One shape of one norm. Functions take (x, weight, bias, activation, residual); `parameters` is weight's shape."""

    op: str
    shape: tuple[int, ...]
    parameters: tuple[int, ...]
    device: str
    dtype: str
    layout: str
    against: list[str]
    bias: bool = True
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        dtype, generator = getattr(torch, self.dtype), torch.Generator(self.device).manual_seed(0)

        def tensor(name: str) -> Tensor:
            shape = self.parameters if name in ("weight", "bias") else self.shape
            t = torch.randn(shape, generator=generator, device=self.device)
            t = (t.abs() + 0.5 if name == "weight" else t).to(dtype)
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and self.layout == "nhwc" else t

        names = ("x", "residual", "dy", "weight", *(["bias"] if self.bias else []))
        self.tensors = {name: tensor(name) for name in names}

    def cases(self, ours: Callable, eager: Callable, plan: Plan) -> Iterator[Case]:
        """Every entry of the plan, both sides."""
        for what, kind, activation, added in plan:
            run = self._forward(activation, added) if kind == "forward" else self._backward(activation, added, kind)
            passes = {"forward": 2 + added, "backward": 3 + added, "both": 5 + 2 * added}[kind]
            loose = kind != "forward" and (activation == "relu" or self.tensors["x"].element_size() == 2)
            yield self.case(what, passes, run, ours, eager, LOOSE if loose else TOLERANCE)

    def case(self, what: str, passes: int, run: Callable, ours: Callable, eager: Callable, tolerance=TOLERANCE) -> Case:
        """run(function) on both sides; passes: over the input, at least."""
        x = self.tensors["x"]
        size, target = x.numel() * x.element_size(), torch.empty_like(x)
        return Case(
            self.op, self.shape, self.layout, self.dtype, what, passes * size, lambda: run(ours),
            theirs(run, eager, self.against), tolerance[self.dtype], lambda: target.copy_(x), 2 * size,
        )  # fmt: skip

    def _forward(self, activation: str | None, added: bool) -> Callable:
        t = self.tensors

        def run(f: Callable) -> Tensor:
            with torch.no_grad():
                return f(t["x"], t["weight"], t.get("bias"), activation, t["residual"] if added else None)

        return run

    def _backward(self, activation: str | None, added: bool, kind: str) -> Callable:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.tensors.items() if n != "dy"}
        if not added:
            del leaves["residual"]
        dy, kept = self.tensors["dy"], {}

        def forward(f: Callable) -> Tensor:
            return f(leaves["x"], leaves["weight"], leaves.get("bias"), activation, leaves.get("residual"))

        def run(f: Callable) -> tuple[Tensor, ...]:
            if kind == "both":
                return torch.autograd.grad(forward(f), list(leaves.values()), dy)
            if f not in kept:
                kept[f] = forward(f)
            return torch.autograd.grad(kept[f], list(leaves.values()), dy, retain_graph=True)

        return run


def call_cases(
    op: str, shape: tuple[int, ...], ours: torch.nn.Module, eager: torch.nn.Module, device: str, dtype: str,
    against: list[str],
) -> Iterator[Case]:  # fmt: skip
    """What a call costs beside the work: modules on a tiny tensor."""
    bench = Bench(op, shape, (), device, dtype, "nchw", [a for a in against if a == "eager"])
    ours, eager = (m.to(device, getattr(torch, dtype)) for m in (ours, eager))
    x, dy = bench.tensors["x"], bench.tensors["dy"]
    leaf = x.clone().requires_grad_()

    def forward(module: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return module(x)

    def both(module: torch.nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(leaf), leaf, dy)

    yield bench.case("module call, forward", 2, forward, ours, eager)
    yield bench.case("module call, forward + backward", 5, both, ours, eager)
