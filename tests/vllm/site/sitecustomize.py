"""Lets torchvision be imported beside the CPU build of torch, in this process and those that it starts: its import says
more about operators that are not there. They are declared; nothing calls them."""

from __future__ import annotations

import sys
from typing import Any


class BeforeTorchvision:
    """A finder that finds nothing, but sees torchvision coming."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # pyright: ignore
            import torch

            self.library = library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


BEFORE = BeforeTorchvision()  # kept, as declarations end with the object that made them
sys.meta_path.insert(0, BEFORE)  # pyright: ignore
