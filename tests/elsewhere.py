"""A device that is not the CPU, for machines that have no other: code that mixes up the two fails here as on a GPU.

`Elsewhere` tensors compute on the CPU but say that they are on `DEVICE`. An operation that gets one of them together
with an ordinary tensor (a scalar is allowed, as on a GPU) raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
"""A name that PyTorch knows without a GPU."""
ALLOWED = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
}
"""Copies, and indices on the CPU into what is on the device, with their backward."""


_alive: list[weakref.ref[torch.Tensor]] = []


def alive() -> list[Elsewhere]:
    """Tensors on the device that somebody still holds."""
    return [x for x in (ref() for ref in _alive) if isinstance(x, Elsewhere)]


class Elsewhere(torch.Tensor):
    _inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self._inner = inner
        _alive.append(weakref.ref(self))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self._inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    asked = kwargs.get("device")
    if asked is None and not there:
        return func(*args, **kwargs)
    if there and here and func not in ALLOWED:
        raise RuntimeError(f"{func}: some tensors are on the CPU, some are not")
    goes = there and func is not torch.ops.aten._to_copy.default if asked is None else torch.device(asked) == DEVICE
    if func is torch.ops.aten._to_copy.default and asked is None:
        goes = bool(there)
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    inner = dict(kwargs)
    if asked is not None:
        inner["device"] = torch.device("cpu")
    out = func(
        *tree_map_only(Elsewhere, lambda x: x._inner, args), **tree_map_only(Elsewhere, lambda x: x._inner, inner)
    )
    if not goes:
        return out
    out = tree_map_only(torch.Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def _inner(x: Any) -> Any:
    return tree_map_only(Elsewhere, lambda tensor: tensor._inner, x)


class _Tensor(TorchFunctionMode):
    """What does not ask modes that look at operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, DEVICE is a device: what is made there, or comes from the CPU, computes.

    Inference mode is `no_grad` there: its tensors cannot wrap others, of which views are taken.
    """
    plain = {name: getattr(torch.no_grad, name) for name in ("__enter__", "__exit__")}
    with mock.patch.multiple(torch.inference_mode, **plain), _Tensor(), _Operations():
        yield
