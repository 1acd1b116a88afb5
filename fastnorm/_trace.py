"""What a module's forward does with its submodules, as a graph that says when it holds.

torch.fx follows one path through the Python code. Here whatever that path depended on and could change becomes a guard
(the module's attributes, training among them, its arguments, its children), and what a graph cannot say (contexts,
attributes that forward sets, random numbers, custom gradients) makes the trace fail.
"""

import contextlib
import inspect
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

ABSENT, GIVEN, TENSOR, SEQUENCE = "absent", "given", "tensor", "sequence"  # what an argument has to be

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout,
    type, type(lambda: 0), type(len), type(torch.relu),
)  # fmt: skip


class Untraceable(Exception):
    """The reason why a module is left alone."""


@dataclass(frozen=True)
class Guards:
    """When a graph stands for a forward."""

    arguments: tuple[tuple[str, str, Any], ...]  # name, what it has to be, its default
    attributes: tuple[tuple[tuple[str, ...], str, Any], ...]  # path of the module, name, frozen value
    children: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # path, names of the submodules
    inlined: tuple[tuple[str, ...], ...]  # paths of those that are not called as a module, so that hooks would not run


@dataclass
class Trace:
    graph: fx.Graph
    guards: Guards


def traces(module: nn.Module, inline: Callable[[str, nn.Module], bool]) -> list[Trace]:
    """Every way through a module's forward: training or not, optional arguments given or not, tensors or lists.

    Submodules are leaves but for those that inline(path, module) allows.

    Raises:
        Untraceable: with the reason, if there is no way.
    """
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced")
    if is_parametrized(module):
        raise Untraceable("is parametrized")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if odd := [p for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD]:
        raise Untraceable(f"its forward takes {odd[0]}")
    optional = any(p.default is None for p in parameters)
    found: list[Trace] = []
    problem: Untraceable | None = None
    for given in (False, True) if optional else (False,):
        for training in (module.training, not module.training):
            try:
                some = _trace_one(module, parameters, inline, training, given)
            except Untraceable as error:
                problem = problem or error
                continue
            found += some
            if not any(name == "training" and not path for t in some for path, name, _ in t.guards.attributes):
                break
    if not found:
        raise problem
    return found


def freeze(value: Any) -> Any:
    """A hashable value to compare with later; raises Untraceable for what could change unseen."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple | list | torch.Size):
        return (type(value).__name__, *(freeze(v) for v in value))
    raise Untraceable(f"its forward reads a {type(value).__name__}")


def _trace_one(
    module: nn.Module, parameters: Sequence[inspect.Parameter], inline: Callable, training: bool, given: bool
) -> list[Trace]:
    was = module.training
    try:
        module.__dict__["training"] = training
        found = []
        for kind in (TENSOR, SEQUENCE):
            tracer = _Tracer(module, parameters, inline, given, kind)
            found.append(tracer.run())
            if not tracer.asked:  # what the arguments are
                break
        return found
    finally:
        module.__dict__["training"] = was


class _Proxy(fx.Proxy):
    """torch.fx's records ``a += b`` as ``a = a + b``, and other names of a do not change."""


def _in_place(function: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, module: nn.Module, parameters: Sequence[inspect.Parameter], inline: Callable, given: bool, kind: str
    ) -> None:
        super().__init__()
        self.module, self.parameters, self.inline, self.given, self.kind = module, parameters, inline, given, kind
        self.asked: set[str] = set()
        self.inlined: set[str] = set()
        self.read: dict[tuple[str, str], Any] = {}
        self.state = _state()

    def run(self) -> Trace:
        generators = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        try:
            graph = self.trace(self.module)
            if not _same_generators(generators):
                raise Untraceable("its forward draws random numbers that do not depend on its input")
        except Untraceable:
            raise
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            raise Untraceable(f"its forward cannot be traced: {message or type(error).__name__}") from None
        finally:
            random.setstate(generators[0])
            numpy.random.set_state(generators[1])
            torch.set_rng_state(generators[2])
        return Trace(graph, self._guards(graph))

    def _guards(self, graph: fx.Graph) -> Guards:
        arguments = []
        for p in self.parameters:
            what = self._expected(p)
            if what == GIVEN and p.name in self.asked:
                what = self.kind
            arguments.append((p.name, what, None if p.default is p.empty else freeze(p.default)))
        containers = {()} if isinstance(self.module, nn.Sequential | nn.ModuleList | nn.ModuleDict) else set()
        for node in graph.nodes:
            if node.op == "call_module":
                path = tuple(node.target.split("."))
                containers |= {path[:i] for i in range(1, len(path))}
        children = [(path, tuple(self.module.get_submodule(".".join(path))._modules)) for path in sorted(containers)]
        attributes = [(tuple(path.split(".")) if path else (), n, v) for (path, n), v in self.read.items()]
        inlined = [tuple(path.split(".")) for path in sorted(self.inlined)]
        return Guards(tuple(arguments), tuple(attributes), tuple(children), tuple(inlined))

    def _expected(self, parameter: inspect.Parameter) -> str:
        if parameter.default is parameter.empty or (parameter.default is None and self.given):
            return GIVEN
        return ABSENT

    # ---- What torch.fx calls ----------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        args = [self.root]
        for p in self.parameters:
            given = self._expected(p) == GIVEN
            args.append(self.create_proxy("placeholder", p.name, (), {}) if given else p.default)

        def watched(*args: Any) -> Any:
            with _watching(self):
                return root_fn(*args)

        return watched, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if not self.inline(path, module):
            return True
        self.inlined.add(path)
        return False

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            known = (*self.module.parameters(), *self.module.buffers())
            if not any(a is t for t in known):
                raise Untraceable("its forward uses a tensor that is neither an input, a parameter nor a buffer")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self.state:
            raise Untraceable("its forward enters a context (no_grad, autocast, checkpoint, …)")
        return super().create_node(*args, **kwargs)

    # ---- What the watched functions call ----------------------------------------------------------------------------

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        path = self.submodule_paths.get(module)
        if path is None or name in _INTERNAL:
            return
        try:
            self.read[path, name] = freeze(value)
        except Untraceable as error:
            raise Untraceable(f"{error} as self.{name}") from None

    def is_instance(self, value: Any, classes: Any) -> bool:
        """isinstance() in the code that is traced."""
        if not isinstance(value, fx.Proxy):
            return isinstance(value, classes)
        if value.node.op != "placeholder":
            raise Untraceable("its forward asks for the type of what it computed")
        self.asked.add(value.node.target)
        likeness = torch.empty(0) if self.kind == TENSOR else []
        return isinstance(likeness, classes)


def _state() -> tuple:
    """What contexts change; a graph does not keep them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks is None,
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )  # fmt: skip


def _same_generators(before: tuple) -> bool:
    now = numpy.random.get_state()
    same_numpy = all(numpy.array_equal(a, b) for a, b in zip(before[1], now, strict=True))
    return random.getstate() == before[0] and same_numpy and torch.equal(torch.get_rng_state(), before[2])


@contextlib.contextmanager
def _watching(tracer: _Tracer) -> Iterator[None]:
    """While it is open, the tracer sees what is read of modules, and what a graph would lose raises Untraceable."""

    def read(module: nn.Module, name: str) -> Any:
        attributes = object.__getattribute__(module, "__dict__")
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            for registered in ("_modules", "_parameters", "_buffers"):
                if attributes.get(registered, {}).get(name, tracer) is None:
                    tracer.note(module, name, None)
            raise
        if name in attributes:
            tracer.note(module, name, value)
        return value

    def write(module: nn.Module, name: str, value: Any) -> None:
        raise Untraceable(f"its forward sets self.{name}")

    apply = vars(torch.autograd.Function)["apply"]

    def apply_function(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            raise Untraceable(f"its forward calls the autograd function {cls.__name__}")
        return apply.__get__(None, cls)(*args, **kwargs)

    names = inspect.unwrap(type(tracer.module).forward).__globals__
    with (
        mock.patch.dict(names, {"isinstance": tracer.is_instance}),
        mock.patch.object(nn.Module, "__getattribute__", read, create=True),
        mock.patch.object(nn.Module, "__setattr__", write),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply_function)),
    ):
        yield
