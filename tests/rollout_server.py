"""A rollout server in a process of its own, as `longrl rollout-server` starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from longrl.config import RlConfig
from longrl.config_files import save_config

START_S = 280.0


class ServerProcess:
    """Serves while it is entered; can be killed, and started again at the same port."""

    def __init__(self, config: RlConfig, folder: Path, python: str = sys.executable, **environment: str) -> None:
        """
        Args:
            config: of a run.
            folder: a new one, for the configuration and the log.
            python: of the environment that the server runs in.
        """
        self.folder, self.python, self.environment = folder, python, environment
        folder.mkdir(parents=True)
        save_config(config, folder / "server.yaml")
        self.port = 0

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def start(self) -> None:
        """Returns when it answers."""
        command = [self.python, "-m", "longrl", "rollout-server", str(self.folder / "server.yaml")]
        with (self.folder / "log.txt").open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stderr=file,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            )
        until = time.monotonic() + START_S
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)$", self.log, re.MULTILINE)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.1)
        self.port = int(found[1])

    def kill(self) -> None:
        """As a node that is lost."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
