"""What the CPU build of vLLM needs around it; see site/sitecustomize.py."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

SITE = str(Path(__file__).parent / "site")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SITE, os.environ.get("PYTHONPATH"))))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
KEPT = runpy.run_path(str(Path(SITE, "sitecustomize.py")), run_name="sitecustomize")
