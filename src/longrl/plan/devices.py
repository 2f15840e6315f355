"""What a plan takes a device to be capable of. None of these figures was measured by this project: rates and memory are
those of the makers' data sheets, the shares of them that are reached are assumptions, so planned times are estimates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from longrl.runtime import rank_and_size

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Of one process."""

    name: str
    memory_bytes: int
    flops: dict[int, float]
    """Peak operations a second in products of numbers of so many bytes."""
    bandwidth: float
    """Bytes a second from its memory."""
    link: float
    """Bytes a second that a process sends to others of its node."""
    host_link: float
    """Bytes a second to host memory."""
    launch_s: float
    """Of one small operation in eager mode: what bounds decoding a few streams."""
    products: float = 0.6
    """Share of the peak rate that large products reach."""
    attention: float = 0.45
    """Share that attention over long sequences reaches."""
    movement: float = 0.7
    """Share that copies and messages reach."""
    usable: float = 0.92
    """Share of the memory that may be planned: the rest goes to fragmentation."""
    runtime_bytes: int = int(1.5e9)
    """What a process takes before it holds any tensor: driver, libraries, communication buffers."""
    host_bytes: int | None = None
    """Of the host's memory, beside a GPU; None: that machine is not this one, so nobody knows."""

    @property
    def is_cpu(self) -> bool:
        return self.name == CORE.name

    @property
    def planned_bytes(self) -> int:
        """For tensors."""
        return int(self.memory_bytes * self.usable) - self.runtime_bytes

    @property
    def planned_host_bytes(self) -> int | None:
        """Pinned, beside a GPU; the rest goes to the programs themselves and to files that are read."""
        return None if self.host_bytes is None else int(self.host_bytes * self.usable) - self.runtime_bytes

    def shared_by(self, times: int) -> Device:
        """With so many times as many processes on the same machine: each has a GPU, but a smaller share of the rest."""
        if self.is_cpu:
            return replace(self, memory_bytes=self.memory_bytes // times)
        return replace(self, host_bytes=None if self.host_bytes is None else self.host_bytes // times)


GPUS = {
    "A100-80G": Device(
        name="A100-80G",
        memory_bytes=80 * GIB,
        flops={2: 312e12, 4: 19.5e12, 8: 19.5e12},
        bandwidth=2.0e12,
        link=300e9,
        host_link=32e9,
        launch_s=8e-6,
    ),
    "H100": Device(
        name="H100",
        memory_bytes=int(79.6 * GIB),
        flops={2: 989e12, 4: 67e12, 8: 67e12},
        bandwidth=3.35e12,
        link=450e9,
        host_link=64e9,
        launch_s=6e-6,
        products=0.5,
        attention=0.4,
    ),
    "H200": Device(
        name="H200",
        memory_bytes=139 * GIB,
        flops={2: 989e12, 4: 67e12, 8: 67e12},
        bandwidth=4.8e12,
        link=450e9,
        host_link=64e9,
        launch_s=6e-6,
        products=0.5,
        attention=0.4,
    ),
}
CORE = Device(
    name="CPU",
    memory_bytes=0,
    flops={2: 60e9, 4: 60e9, 8: 30e9},
    bandwidth=10e9,
    link=2e9,
    host_link=5e9,
    launch_s=1e-5,
    runtime_bytes=int(0.2e9),
)
"""Of any machine."""
DEVICES = (*GPUS, CORE.name)


def find_device(name: str, processes: int = 1) -> Device:
    """By name; `CPU` is this machine, a share of it for each of so many processes, and so is the host of a GPU that
    this machine has.

    Raises:
        ValueError: no such device.
    """
    name = next((known for known in DEVICES if known.casefold() == name.casefold()), name)
    if name in GPUS:
        here = _gpus_here(name)
        return replace(GPUS[name], host_bytes=_machine_bytes() // min(here, processes) if here else None)
    if name != CORE.name:
        raise ValueError(f"no device {name!r}; known: {', '.join(DEVICES)}")
    cores = max(1.0, len(os.sched_getaffinity(0)) / processes) if hasattr(os, "sched_getaffinity") else 1.0
    flops = {size: rate * cores for size, rate in CORE.flops.items()}
    return replace(CORE, memory_bytes=_machine_bytes() // processes, flops=flops)


def _gpus_here(name: str, driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """How many of this kind the driver knows."""
    models = [file.read_text() for file in driver.glob("*/information")]
    return sum(all(part in model for part in name.split("-")) for model in models)


def host_share_bytes() -> int:
    """Of this machine's memory, for each of the processes that torchrun started here."""
    return _machine_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_size()[1]))


def _machine_bytes() -> int:
    """Of memory: the machine's, or what its control group may have."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
