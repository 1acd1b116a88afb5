"""A model that exists: its torch.nn layers become fastnorm's in place, and back.

Only the class of a module changes. The object, its Parameters, buffers, hooks and mode stay, and so does whatever
refers to them: optimisers, DistributedDataParallel, averaged copies, other names of the same module.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import layers
from ._info import info

# torch.nn's class -> fastnorm's, for each fastnorm layer that is a subclass of its namesake
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    theirs: ours
    for name in layers.__all__
    if (theirs := getattr(nn, name, None)) and issubclass(ours := getattr(layers, name), theirs)
}
ORIGINALS = {ours: theirs for theirs, ours in REPLACEMENTS.items()}

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ADDED = "_fastnorm_added"  # of a converted module: the names of the attributes that it got
ORIGINAL = "_fastnorm_original"  # of a class that fastnorm.fuse made: the class that it stands for

Skip = str | type[nn.Module] | Iterable[str | type[nn.Module]]


class Replaced(NamedTuple):
    """A module that has another class now."""

    name: str
    before: str
    after: str


class Fused(NamedTuple):
    """A norm and what follows it, as one call in the forward of module `name`."""

    name: str
    what: str


class Skipped(NamedTuple):
    """What was left as it is."""

    name: str
    kind: str
    reason: str


@dataclass
class ConvertReport:
    """What happened to each module; prints as a table."""

    replaced: list[Replaced] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("", "module", "was", "is")]
        rows += [("replaced", r.name or "(the model)", r.before, r.after) for r in self.replaced]
        rows += [("fused", f.name or "(the model)", f.what, "one call") for f in self.fused]
        rows += [("skipped", s.name or "(the model)", s.kind, s.reason) for s in self.skipped]
        total = f"{len(self.replaced)} replaced, {len(self.fused)} fused, {len(self.skipped)} skipped"
        if len(rows) == 1:
            return total
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        return "\n".join([*lines, total])

    __repr__ = __str__


def convert(model: nn.Module, *, skip: Skip = ()) -> ConvertReport:
    """Turns a model's torch.nn layers into fastnorm's, in place.

    A module's class becomes the fastnorm subclass of it; the module, its Parameters, buffers, hooks, mode, dtype and
    device stay, so that optimisers, DistributedDataParallel and state_dicts notice nothing. Before or after
    ``.to(...)``, wrapping, compiling and copying. Subclasses of torch's layers are left alone, since they may do
    something else, and lazy modules until they know their size. A second call changes nothing.

    Args:
        model: any module; it may itself be a layer.
        skip: names of modules or types of modules, one or several, that are left alone with everything in them.

    Returns:
        ConvertReport: prints as a table; ``replaced`` and ``skipped`` are its lists.

    Raises:
        TypeError: for a model that is not a module, or a skip that is neither a name nor a type.
        ValueError: for a name in skip that no module has.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = convert(model, skip="0")
        >>> [(r.name, r.after) for r in report.replaced]
        [('1', 'fastnorm.BatchNorm2d')]
    """
    _check_model("convert", model)
    left = _modules_to_skip("convert", model, skip)
    report = ConvertReport()
    usable = _usable_devices()
    elsewhere = {t.device.type for t in _tensors(model)} - usable
    for name, module in model.named_modules():
        theirs = _torch_layer(module)
        if theirs is None:
            continue
        if reason := _reason_to_skip(module, theirs, id(module) in left, usable, elsewhere):
            report.skipped.append(Skipped(name, _class_name(type(module)), reason))
            continue
        ours = REPLACEMENTS[theirs]
        report.replaced.append(Replaced(name, _class_name(theirs), _class_name(ours)))
        _set_layer_class(module, theirs, ours)
        added = _missing_keywords(module, theirs, ours)
        module.__dict__.update(added)
        module.__dict__[ADDED] = tuple(added)
    return report


def revert(model: nn.Module) -> ConvertReport:
    """Undoes :func:`convert` and :func:`fastnorm.fuse`, in place: the model has its torch.nn layers and forward again.

    Layers that were fastnorm's before stay so.

    Args:
        model: what was converted or fused.

    Returns:
        ConvertReport: prints as a table.

    Raises:
        TypeError: for a model that is not a module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> _ = convert(model), revert(model)
        >>> type(model[1]) is torch.nn.BatchNorm2d
        True
    """
    _check_model("revert", model)
    report = ConvertReport()
    for name, module in model.named_modules():
        unfuse(module)
        ours = next((c for c in type(module).__mro__ if c in ORIGINALS), None)
        if ours is None or ADDED not in module.__dict__:
            continue
        if getattr(module, "activation", None) is not None:
            reason = f"its activation was set to {module.activation!r}, which torch's class has not"
            report.skipped.append(Skipped(name, _class_name(ours), reason))
            continue
        for attribute in module.__dict__.pop(ADDED):
            module.__dict__.pop(attribute, None)
        for attribute in ("activation", "negative_slope"):  # set to what they were
            module.__dict__.pop(attribute, None)
        report.replaced.append(Replaced(name, _class_name(ours), _class_name(ORIGINALS[ours])))
        _set_layer_class(module, ours, ORIGINALS[ours])
    return report


def unfuse(module: nn.Module) -> None:
    """Gives a module the class that it had before fastnorm.fuse."""
    made = next((c for c in type(module).__mro__ if ORIGINAL in vars(c)), None)
    if made is not None:
        _set_layer_class(module, made, getattr(made, ORIGINAL))
    module.__dict__.pop("fuse_report", None)


def _set_layer_class(module: nn.Module, before: type, after: type) -> None:
    """Where the module's class is `before`, or a class that parametrize made of it, puts `after` in its place."""
    if type(module) is before:
        module.__class__ = after
        return
    # parametrize's class is shared with the module's copies, which keep theirs; so a new one with the same content.
    content = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(type(module).__name__, (after,), content)


def _torch_layer(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn layer with a fastnorm namesake that a module is, is a kind of, or will become."""
    if isinstance(module, LazyModuleMixin):
        becomes = getattr(module, "cls_to_become", None)
        return becomes if becomes in REPLACEMENTS else None
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", None)
        return next((c for c in REPLACEMENTS if c.__name__ == name), None)
    return next((c for c in type(module).__mro__ if c in REPLACEMENTS), None)


def _reason_to_skip(
    module: nn.Module, theirs: type[nn.Module], asked: bool, usable: set[str], elsewhere: set[str]
) -> str | None:
    if isinstance(module, REPLACEMENTS[theirs]) or type(module).__module__.startswith("fastnorm."):
        return "is fastnorm's already"
    if asked:
        return "named in skip"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit: convert the model before"
    if isinstance(module, LazyModuleMixin):
        return "is lazy: convert the model after its first call"
    if type(module) is not theirs and not (is_parametrized(module) and type(module).__bases__ == (theirs,)):
        return f"is a subclass of {_class_name(theirs)}, which may do something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    tensors = list(_tensors(module))
    if dtypes := {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()} - set(DTYPES):
        return f"fastnorm has no {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    devices = {t.device.type for t in tensors} - usable if tensors else elsewhere
    if devices:
        return f"this build of fastnorm does not run on {', '.join(sorted(devices))}"
    return None


def _usable_devices() -> set[str]:
    return {"cpu", "meta", *(["cuda"] if info()["cuda"] is not None else [])}


def _missing_keywords(module: nn.Module, theirs: type, ours: type) -> dict[str, Any]:
    """The keywords that fastnorm's class has beyond torch's, at their defaults, unless the class itself has those."""
    of_torch = inspect.signature(theirs.__init__).parameters
    return {
        name: parameter.default
        for name, parameter in inspect.signature(ours.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in of_torch and not hasattr(module, name)
    }


def _modules_to_skip(op: str, model: nn.Module, skip: Skip) -> set[int]:
    """The ids of the modules that are to be left alone."""
    items = (skip,) if isinstance(skip, str | type) else tuple(skip)
    names = dict(model.named_modules(remove_duplicate=False))
    roots: list[nn.Module] = []
    for item in items:
        if isinstance(item, str):
            if item not in names:
                raise ValueError(f"{op}: skip must name modules of the model, got {item!r}")
            roots.append(names[item])
        elif isinstance(item, type) and issubclass(item, nn.Module):
            roots += [m for m in names.values() if isinstance(m, item)]
        else:
            raise TypeError(f"{op}: skip must hold names and types of modules, got {item!r}")
    return {id(m) for root in roots for m in root.modules()}


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _check_model(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: the model must be a torch.nn.Module, got {type(model).__name__}")


def _class_name(cls: type) -> str:
    package = cls.__module__.partition(".")[0]
    prefix = {"torch": "nn.", "fastnorm": "fastnorm."}.get(package, "")
    return prefix + cls.__name__
