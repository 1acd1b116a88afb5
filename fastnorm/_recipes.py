"""How a tensor can be made again, instead of being kept for backward; what save_memory turns on."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _State(threading.local):
    recorder: "Recorder | None" = None


_state = _State()


def recorder() -> "Recorder | None":
    """What collects the recipes of this thread, where something does."""
    return _state.recorder


def set_recorder(new: "Recorder | None") -> "Recorder | None":
    """Returns the one before."""
    before, _state.recorder = _state.recorder, new
    return before


class Kept:
    """A tensor that is kept as it is (by the hooks around, if there are any)."""

    __slots__ = ("outer", "saved", "tensor", "version")

    def __init__(self, t: Tensor, outer: Hooks | None) -> None:
        self.outer, self.tensor, self.saved, self.version = outer, None, None, t._version
        if outer is None:
            self.tensor = t
        else:
            self.saved = outer[0](t)

    def get(self) -> Tensor:
        if self.outer is not None:
            return self.outer[1](self.saved)
        if (now := self.tensor._version) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.type()} {list(self.tensor.shape)} is at version {now}; expected version {self.version} "
                "instead (fastnorm.save_memory)"
            )
        return self.tensor


class Recipe:
    """Makes a tensor from others. What it made is shared by all that still wait for it."""

    __slots__ = ("__weakref__", "inputs", "lock", "make", "pending", "result")

    def __init__(self, make: Callable[..., Tensor], inputs: Sequence["Kept | Share | None"]) -> None:
        self.make, self.inputs = make, inputs
        self.pending, self.result, self.lock = 0, None, threading.Lock()

    def get(self, last: bool) -> Tensor:
        with self.lock:
            result = self.result
            if result is None:
                with torch.no_grad():
                    result = self.make(*(None if i is None else i.get() for i in self.inputs))
            if last:
                self.pending -= 1
            self.result = result if self.pending else None
            return result

    def drop(self) -> None:
        with self.lock:
            self.pending -= 1
            if not self.pending:
                self.result = None


class Share:
    """One user's claim to a recipe's tensor, or to a view of it."""

    __slots__ = ("geometry", "recipe", "used")

    def __init__(self, recipe: Recipe, geometry: tuple | None) -> None:
        self.recipe, self.geometry, self.used = recipe, geometry, False
        recipe.pending += 1

    def get(self) -> Tensor:
        first, self.used = not self.used, True
        t = self.recipe.get(first)
        return t if self.geometry is None else t.as_strided(*self.geometry)

    def __del__(self) -> None:
        if not self.used:
            self.recipe.drop()


class Recorder:
    """The recipes of the tensors that are alive, by their memory; and the hooks that put recipes in tensors' place."""

    def __init__(self, outer: Hooks | None) -> None:
        self.outer = outer
        self.known: dict[int, tuple[weakref.ref, int, tuple, Recipe]] = {}

    def remember(self, y: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        """y, which autograd has just recorded, can be made again by make(*inputs)."""
        if not y.requires_grad or y.numel() == 0:
            return
        key = y.untyped_storage()._cdata
        recipe = Recipe(make, [None if t is None else self.pack(t.detach()) for t in inputs])
        forget = weakref.ref(y, lambda _, known=self.known: known.pop(key, None))
        self.known[key] = (forget, y._version, _geometry(y), recipe)

    def pack(self, t: Tensor) -> Kept | Share:
        found = self.known.get(t.untyped_storage()._cdata) if type(t) is Tensor else None
        if found is not None:
            of, version, geometry, recipe = found
            y = of()
            if y is not None and t._version == version and t.dtype == y.dtype:
                mine = _geometry(t)
                if mine == geometry:
                    return Share(recipe, None)
                size, stride, offset = mine
                return Share(recipe, (size, stride, offset - geometry[2]))
        return Kept(t, self.outer)

    @staticmethod
    def unpack(packed: Kept | Share) -> Tensor:
        return packed.get()


def _geometry(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.storage_offset()
