"""Inputs of recomputed layers in host memory, from the forward pass until the backward pass asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Offload:
    """Of one prefix pass: while the device computes a layer, the input of the one before travels to the host; in the
    backward pass, the input of the layer that comes next travels back."""

    def __init__(self) -> None:
        self._last: _HostCopy | None = None

    @contextmanager
    def keeps(self, hidden: Tensor) -> Iterator[None]:
        """Inside, what autograd saves of `hidden` is put on the host, all else stays where it is."""
        which = hidden.data_ptr(), hidden.shape  # autograd holds these functions, and they must not hold the tensor

        def pack(x: Tensor) -> Tensor | _HostCopy:
            if (x.data_ptr(), x.shape) != which:
                return x
            self._last = _HostCopy(x, self._last)
            return self._last

        def unpack(kept: Tensor | _HostCopy) -> Tensor:
            return kept.take() if isinstance(kept, _HostCopy) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class _HostCopy:
    """One input. On a GPU the copies run beside the computation, on a stream of their own and from pinned memory."""

    def __init__(self, x: Tensor, before: _HostCopy | None) -> None:
        """before: of the layer below, which is asked for next."""
        self.device, self.before, self.fetched = x.device, before, None
        self.stream = _stream(x.device)
        self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            self.host.copy_(x.detach())
            return
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            self.host.copy_(x.detach(), non_blocking=True)
        x.record_stream(self.stream)

    def fetch(self) -> None:
        if self.fetched is not None:
            return
        if self.stream is None:
            self.fetched = self.host.to(self.device)
            return
        self.fetched = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been in use
        with torch.cuda.stream(self.stream):
            self.fetched.copy_(self.host, non_blocking=True)
        self.fetched.record_stream(self.stream)

    def take(self) -> Tensor:
        self.fetch()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        x, self.fetched = self.fetched, None
        assert x is not None
        if self.before is not None:
            self.before.fetch()
        return x


_streams: dict[torch.device, torch.cuda.Stream] = {}
"""One of each GPU: copies wait for each other, so that they come in the order in which they are needed."""


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
