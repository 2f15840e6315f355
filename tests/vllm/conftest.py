"""The CPU build of torch has no operators of torchvision's, whose import declares more about them: they are never called."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
_TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
