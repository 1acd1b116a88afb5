"""Norms, convolutions and what follows them become one call, in the forward of a model that exists.

Each module is traced by itself (_trace.py). Where a norm is followed by an activation, or by an addition, or a
convolution by an activation, and nothing else sees what is between, the module's class becomes a subclass of it whose
forward makes one call instead. Everything else of the module stays, and the original forward is there for whatever the
trace did not foresee.
"""

import copyreg
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package import sys_importer

from . import functional
from ._trace import ABSENT, GIVEN, SEQUENCE, TENSOR, Guards, Trace, Untraceable, freeze, traces
from .activation import activate
from .conv2d import Conv2d, makes_its_result
from .convert import (
    ORIGINAL,
    ConvertReport,
    Fused,
    Skip,
    Skipped,
    _check_model,
    _class_name,
    _modules_to_skip,
    convert,
    unfuse,
)
from .module import FusedNorm, intercepted, is_plain
from .save_memory import save_memory as saving_memory

# ---- What is looked for ---------------------------------------------------------------------------------------------

# activation of fastnorm -> as modules, functions and methods of torch
_ACTIVATION_MODULES = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu", nn.Hardswish: "hardswish",
}  # fmt: skip
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu", F.elu: "elu", F.elu_: "elu", torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", torch.tanh_: "tanh", F.tanh: "tanh",
    F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
}  # fmt: skip
_ACTIVATION_METHODS = {n: n.rstrip("_") for n in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")}
# the other arguments of the functions, in order, with their defaults
_OTHER_ARGUMENTS = {
    "leaky_relu": {"negative_slope": 0.01, "inplace": False}, "elu": {"alpha": 1.0, "inplace": False},
    "gelu": {"approximate": "none"},
}  # fmt: skip

_ADDITIONS = {operator.add, torch.add, "add", "__add__"}
_ADDITIONS_IN_PLACE = {operator.iadd, "add_", "__iadd__"}

_NORM_FUNCTIONS = {
    getattr(library, name): name
    for name in ("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
    for library in (F, functional)
}

# What a call can be fused into; a convolution adds nothing to its result.
_FUSIBLE = (FusedNorm, Conv2d)

# Modules whose output is no view of their input
_MAKE_NEW = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    FusedNorm,
)


def fuse(model: nn.Module, *, skip: Skip = (), save_memory: bool = False) -> nn.Module:
    """Turns norm -> (addition ->) activation and convolution -> activation into one call each, in place.

    The model's torch.nn layers become fastnorm's (:func:`fastnorm.convert`); then the forward of every module that can
    be traced makes fused calls. Modules keep their class's name and methods, their attributes, hooks and names, and the
    state_dict its keys. Recognised are modules, functions and methods, in place or not: ``nn.ReLU``, ``F.relu``,
    ``x.relu_()``, ``torch.relu``, ``F.silu``, ``F.gelu(approximate=...)``, ``+``, ``+=``, ``torch.add``.

    Left alone are: what is used twice; norms and activations with hooks; sums that broadcast or mix dtypes (seen in
    each call); modules whose forward cannot be traced, whose submodules are fused still. What a trace depended on is
    looked at in each call: if an attribute, the mode, a hook, an argument or a submodule is another than then, the
    module's own forward runs.

    Args:
        model: any module, on any device, before or after wrapping it.
        skip: names of modules or types of modules, one or several, that are left alone with everything in them.
        save_memory: whether calls of the model run under :func:`fastnorm.save_memory`.

    Returns:
        The model itself, with its ConvertReport as the attribute ``fuse_report``. :func:`fastnorm.revert` undoes it.

    Raises:
        TypeError: for a model that is not a module, or a skip that is neither a name nor a type.
        ValueError: for a name in skip that no module has.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [f.what for f in fuse(model).fuse_report.fused]
        ['1 (BatchNorm2d) + 2 (ReLU)']
    """
    _check_model("fuse", model)
    left = _modules_to_skip("fuse", model, skip)
    for module in model.modules():
        unfuse(module)
    report = convert(model, skip=skip)
    plans = {}
    for name, module in model.named_modules():
        if id(module) not in left and _may_be_rewritten(module):
            plans[module] = _plan(name, module, left, report)
    for module, variants in plans.items():
        if variants or (save_memory and module is model):
            module.__class__ = _fused_class(type(module), Plan(tuple(variants), save_memory and module is model))
    if save_memory and model not in plans:
        model.__class__ = _fused_class(type(model), Plan((), True))
    model.__dict__["fuse_report"] = report
    return model


def _may_be_rewritten(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or not any(isinstance(m, _FUSIBLE) for m in module.modules()):
        return False
    return isinstance(module, nn.Sequential | fx.GraphModule) or type(module).__module__.partition(".")[0] != "torch"


# ---- One module: its graphs, rewritten ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Source of a forward and when it may be used."""

    source: str
    imports: str
    guards: Guards


@dataclass(frozen=True)
class Plan:
    variants: tuple[Variant, ...]
    save_memory: bool


@dataclass
class Match:
    """norm -> [addition ->] [activation] in a graph; `last` is what the call takes the place of. The norm may be a
    convolution."""

    norm: fx.Node
    made_by: fx.Node | None = None  # the convolution whose result only the norm uses
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    activation: fx.Node | None = None
    name: str | None = None
    slope: float = 0.01

    @property
    def last(self) -> fx.Node:
        return self.activation or self.addition

    @property
    def in_place(self) -> bool:
        return self.addition is not None and self.addition.target in _ADDITIONS_IN_PLACE

    def nodes(self) -> list[fx.Node]:
        return [n for n in (self.activation, self.addition, self.norm) if n is not None]


def _plan(name: str, module: nn.Module, left: set[int], report: ConvertReport) -> list[Variant]:
    """What a module's forward becomes; nothing where there is nothing to fuse."""

    def sequential(path: str, child: nn.Module) -> bool:
        return type(child).forward is nn.Sequential.forward and is_plain(child) and id(child) not in left

    try:
        found = traces(module, sequential)
        matches = [_matches(t.graph, module, left)[0] for t in found]
        cut = {path for t, ms in zip(found, matches, strict=True) for m in ms for path in _cut_containers(m, t)}
        if any(t.guards.inlined for t in found):
            found = traces(module, lambda path, child: path in cut)
    except Untraceable as reason:
        report.skipped.append(Skipped(name, _class_name(type(module)), str(reason)))
        return []
    variants, fused, skipped = [], Counter(), {}
    for trace in found:
        matches, reasons = _matches(trace.graph, module, left)
        fused |= Counter(_describe(m, module) for m in matches)
        skipped |= reasons
        if not matches:
            continue
        for match in matches:
            _rewrite(trace.graph, match)
        trace.graph.lint()
        code = trace.graph.python_code("self")
        variants.append(Variant(code.src, _format_import_block(code.globals, sys_importer), trace.guards))
    report.fused += [Fused(name, what) for what in fused.elements()]
    prefix = f"{name}." if name else ""
    report.skipped += [Skipped(prefix + at, kind, reason) for (at, kind), reason in skipped.items()]
    return variants


def _matches(graph: fx.Graph, root: nn.Module, left: set[int]) -> tuple[list[Match], dict[tuple[str, str], str]]:
    """What can be fused, and the norms that cannot although something to fuse follows, with the reason."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    _follow_statements_in_place(graph, root, order)
    matches, reasons, taken = [], {}, set()
    for node in reversed(list(graph.nodes)):  # of two norms that are added, the later one takes the sum
        if not _is_norm(node, root):
            continue
        match = _match(node, root)
        if match is None or taken & set(match.nodes()):
            continue
        reason = _obstacle(match, root, order, left)
        if reason:
            at = node.target if node.op == "call_module" else node.name
            kind = _class_name(type(root.get_submodule(at))) if node.op == "call_module" else node.target.__name__
            reasons[at, kind] = reason
            continue
        taken |= set(match.nodes())
        matches.append(match)
    return matches[::-1], reasons


def _match(norm: fx.Node, root: nn.Module) -> Match | None:
    match = Match(norm, _made_by(norm, root))
    convolution = norm.op == "call_module" and isinstance(root.get_submodule(norm.target), Conv2d)
    for user in sorted(norm.users, key=lambda u: _activation(u, root) is None):
        found = _activation(user, root)
        if found and user.args[0] is norm:
            match.activation, (match.name, match.slope) = user, found
            return match
        if convolution:
            continue
        if isinstance(other := _other_operand(user, norm), fx.Node):
            match.addition, match.residual = user, other
            for next_user in user.users:
                found = _activation(next_user, root)
                if len(user.users) == 1 and found and next_user.args[0] is user:
                    match.activation, (match.name, match.slope) = next_user, found
            return match
    return None


def _made_by(norm: fx.Node, root: nn.Module) -> fx.Node | None:
    x = norm.args[0]
    if x.op != "call_module" or len(x.users) > 1:
        return None
    return x if makes_its_result(root.get_submodule(x.target)) else None


def _obstacle(match: Match, root: nn.Module, order: dict[fx.Node, int], left: set[int]) -> str | None:
    """Why a match may not become one call."""
    if len(match.norm.users) > 1:
        return "its output is used twice"
    for node in match.nodes():
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            if id(module) in left:
                return "named in skip"
            if not is_plain(module):
                return "has hooks" if node is match.norm else f"{node.target} has hooks"
    between = [n for n in order if order[match.norm] < order[n] < order[match.last] and n not in match.nodes()]
    seen = _may_share_memory(match.norm.args[0], root)
    if any(seen & set(n.all_input_nodes) or (n.op, n.target) == (match.norm.op, match.norm.target) for n in between):
        return "its input is used between it and what follows"
    return None


def _rewrite(graph: fx.Graph, match: Match) -> None:
    norm, activation = match.norm, match.activation
    with graph.inserting_before(match.last):
        fetch = functools.partial(graph.create_node, "get_attr")
        act = fetch(activation.target) if activation is not None and activation.op == "call_module" else None
        rest = (match.residual, act, match.name, match.slope, match.in_place)
        if norm.op == "call_module":
            made_by = fetch(match.made_by.target) if match.made_by is not None else None
            new = graph.call_function(call_norm, (fetch(norm.target), made_by, norm.args[0], *rest))
        else:
            new = graph.call_function(
                call_norm_function, (_NORM_FUNCTIONS[norm.target], norm.args[0], *rest, *norm.args[1:]), norm.kwargs
            )
    match.last.replace_all_uses_with(new)
    for node in match.nodes():
        graph.erase_node(node)


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    if len(node.args) < 1 or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_function":
        fused = {"activation", "residual"} & set(node.kwargs)
        return node.target in _NORM_FUNCTIONS and not fused and "input" not in node.kwargs
    if node.op != "call_module" or len(node.args) > 1 or node.kwargs:
        return False
    module = root.get_submodule(node.target)
    return isinstance(module, _FUSIBLE) and module.activation is None


def _activation(node: fx.Node, root: nn.Module) -> tuple[str, float] | None:
    """The activation that a node applies to its first argument, and its slope."""
    if len(node.args) < 1:
        return None
    if node.op == "call_module":
        return _module_activation(root.get_submodule(node.target)) if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method":
        only = len(node.args) == 1 and not node.kwargs
        return (_ACTIVATION_METHODS[node.target], 0.01) if only and node.target in _ACTIVATION_METHODS else None
    name = _ACTIVATION_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if name is None:
        return None
    defaults = _OTHER_ARGUMENTS.get(name, {"inplace": False})
    given = dict(defaults) | dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.keys() != defaults.keys() or any(isinstance(v, fx.Node) for v in given.values()):
        return None
    return _known(name, given.get("negative_slope", 0.01), given.get("alpha", 1.0), given.get("approximate", "none"))


def _module_activation(module: nn.Module) -> tuple[str, float] | None:
    name = _ACTIVATION_MODULES.get(type(module))
    if name is None:
        return None
    slope, alpha = getattr(module, "negative_slope", 0.01), getattr(module, "alpha", 1.0)
    return _known(name, slope, alpha, getattr(module, "approximate", "none"))


def _known(name: str, slope: float, alpha: float, approximate: str) -> tuple[str, float] | None:
    if alpha != 1.0:
        return None
    return ("gelu_tanh" if approximate == "tanh" else name), float(slope)


def _other_operand(node: fx.Node, norm: fx.Node) -> Any:
    """What a node adds to the norm's output; None if it does something else."""
    if node.op not in ("call_function", "call_method") or len(node.args) + len(node.kwargs) < 2:
        return None
    kwargs = dict(node.kwargs)
    if kwargs.pop("alpha", 1) != 1:
        return None
    operands = [*node.args, *([kwargs.pop("other")] if "other" in kwargs else [])]
    if kwargs or len(operands) != 2:
        return None
    if node.target in _ADDITIONS_IN_PLACE:
        return operands[1] if operands[0] is norm and operands[1] is not norm else None
    if node.target not in _ADDITIONS or (operands[0] is norm) == (operands[1] is norm):
        return None
    return operands[1] if operands[0] is norm else operands[0]


def _follow_statements_in_place(graph: fx.Graph, root: nn.Module, order: dict[fx.Node, int]) -> None:
    """``x.relu_()`` as a statement: what uses x afterwards uses the result, which is the same tensor."""
    for node in graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node) or not _is_in_place(node, root):
            continue
        x = node.args[0]
        if all(order[user] >= order[node] for user in x.users):
            x.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.target in _ADDITIONS_IN_PLACE:
        return True
    if _activation(node, root) is None:
        return False
    if node.op == "call_module":
        return getattr(root.get_submodule(node.target), "inplace", False)
    name = node.target if node.op == "call_method" else node.target.__name__
    return name.endswith("_") or bool(node.kwargs.get("inplace", False))


def _may_share_memory(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The node, and those of which its result may be a view."""
    seen, waiting = set(), [node]
    while waiting:
        n = waiting.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op != "call_module" or not isinstance(root.get_submodule(n.target), _MAKE_NEW):
            waiting += n.all_input_nodes
    return seen


def _cut_containers(match: Match, trace: Trace) -> set[str]:
    """The Sequentials that hold some of a match but not all of it: to be traced through."""
    inlined = {".".join(path) for path in trace.guards.inlined}
    homes = []
    for node in match.nodes():
        path = node.target.split(".") if node.op == "call_module" else ()
        homes.append({".".join(path[:i]) for i in range(1, len(path))} & inlined)
    return set().union(*homes) - set.intersection(*homes)


def _describe(match: Match, root: nn.Module) -> str:
    parts = []
    for node in match.nodes()[::-1]:
        if node.op == "call_module":
            parts.append(f"{node.target} ({type(root.get_submodule(node.target)).__name__})")
        else:
            parts.append(node.target if isinstance(node.target, str) else node.target.__name__)
    return " + ".join(parts)


# ---- What runs ------------------------------------------------------------------------------------------------------


def _fits(x: Any, residual: Any) -> bool:
    """Whether the fused kernels can add residual to what has x's shape, dtype and device."""
    if not isinstance(x, Tensor) or intercepted(x, residual):
        return False
    if residual is None:
        return True
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _finish(y: Any, residual: Any, act: nn.Module | None, name: str | None, slope: float, in_place: bool) -> Any:
    """Addition and activation by themselves, as they were written."""
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual
    return act(y) if act is not None else activate(y, name, slope)


def call_norm(
    norm: nn.Module, made_by: nn.Module | None, x: Any, residual: Any, act: nn.Module | None, name: str | None,
    slope: float, in_place: bool,
) -> Any:  # fmt: skip
    """activation(norm(x) + residual), in one call if the modules are still what was traced.

    made_by: the convolution that made x for the norm alone, if one did; act: the activation's module, if it is one.
    """
    if act is not None:
        name, slope = _module_activation(act) or (None, slope)
    if (
        isinstance(norm, _FUSIBLE)
        and norm.activation is None
        and is_plain(norm)
        and (act is None or (name is not None and is_plain(act)))
        and _fits(x, residual)
    ):
        own = made_by is not None and isinstance(norm, FusedNorm) and makes_its_result(made_by)
        return (norm.fused_in_place if own else norm.fused)(x, residual, name, slope)
    return _finish(norm(x), residual, act, name, slope, in_place)


def call_norm_function(
    norm: str, x: Any, residual: Any, act: nn.Module | None, name: str | None, slope: float, in_place: bool,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """The same for a function of fastnorm.functional."""
    function = getattr(functional, norm)
    if act is not None:
        name, slope = _module_activation(act) or (None, slope)
    if (act is None or (name is not None and is_plain(act))) and _fits(x, residual):
        return function(x, *args, **kwargs, activation=name, residual=residual, negative_slope=slope)
    return _finish(function(x, *args, **kwargs), residual, act, name, slope, in_place)


def _at(module: nn.Module, path: Iterable[str]) -> nn.Module:
    for name in path:
        module = getattr(module, name)
    return module


_PLAIN = frozenset({type(None), bool, int, float, str})
_KINDS = {GIVEN: object, TENSOR: Tensor, SEQUENCE: (list, tuple)}


def _holds(guards: Guards, module: nn.Module, values: tuple) -> bool:
    """Whether the module and the arguments are as they were when the trace was taken."""
    for (_, what, default), value in zip(guards.arguments, values, strict=True):
        if what == ABSENT:
            if value is not default and (type(value) is not type(default) or value != default):
                return False
        elif value is None or not isinstance(value, _KINDS[what]) or isinstance(value, fx.Proxy):
            return False
    for path, name, value in guards.attributes:
        now = getattr(_at(module, path), name)
        if type(now) not in _PLAIN:
            try:
                now = freeze(now)
            except Untraceable:
                return False
        if now != value:
            return False
    if not all(tuple(_at(module, path)._modules) == names for path, names in guards.children):
        return False
    return all(is_plain(_at(module, path)) for path in guards.inlined)


@functools.cache
def _compiled(variant: Variant) -> Callable:
    names: dict[str, Any] = {}
    exec(variant.imports, names)
    return _forward_from_src(variant.source, names)


@functools.cache
def _fused_class(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """A subclass of a module's class with another forward. Modules that are alike share it."""
    own_forward = cls.forward
    parameters = tuple(inspect.signature(own_forward).parameters.values())[1:]
    variants = tuple((v.guards, _compiled(v), tuple(a[1] != ABSENT for a in v.guards.arguments)) for v in plan.variants)

    def run(self: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not variants or len(args) > len(parameters):
            return own_forward(self, *args, **kwargs)
        rest = parameters[len(args) :]
        values = args + tuple(kwargs.get(p.name, p.default) for p in rest)
        complete = not any(v is inspect.Parameter.empty for v in values)
        if complete and sum(p.name in kwargs for p in rest) == len(kwargs):
            for guards, forward, given in variants:
                if _holds(guards, self, values):
                    return forward(self, *(v for v, g in zip(values, given, strict=True) if g))
        return own_forward(self, *args, **kwargs)

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, args, kwargs)

    @functools.wraps(own_forward)
    def saving_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with saving_memory():
            return run(self, args, kwargs)

    def reduce(self: nn.Module, protocol: int) -> Any:
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:
            return _new, (cls, plan, *reduced[1][1:]), *reduced[2:]
        return reduced

    content = {
        "forward": saving_forward if plan.save_memory else forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        ORIGINAL: cls,
    }
    made = type(cls)(cls.__name__, (cls,), content)
    return made


def _new(cls: type[nn.Module], plan: Plan, *args: Any) -> nn.Module:
    """What pickle and deepcopy begin a copy with."""
    made = _fused_class(cls, plan)
    return made.__new__(made, *args)
