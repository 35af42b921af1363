"""Runs `genarm-fast serve` in its own process, and sends it requests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

TOKENS = 8
START = 270  # seconds for a start on a busy machine
OPTIONS = "--dtype float32 --max-model-len 256 --max-num-seqs 8 --enforce-eager --served-model-name guided"


def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A server process as a user starts it.

    arms: as --arm takes them. options: more of vLLM's options.
    """

    def __init__(
        self, base: Path, arms: Sequence[str], log: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            *(sys.executable, "-m", "genarm_fast", "serve", "--base", str(base)),
            *(part for arm in arms for part in ("--arm", arm)),
            *("--host", "127.0.0.1", "--port", str(self.port), *OPTIONS.split()),
            *("--kv-cache-memory-bytes", str(64 << 20), *options),
        ]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | (environment or {})
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            if self.health() == 200:
                return
            time.sleep(1)
        raise RuntimeError(self.log.read_text()[-5000:])

    def health(self) -> int | None:
        """Return the status of /health; None if the server does not answer."""
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).status_code
        return None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in children:
            if child.is_running():
                child.kill()

    def post(self, path: str, **body: Any) -> requests.Response:
        settings = {"model": "guided", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return requests.post(f"{self.url}/v1/{path}", json=settings | body, timeout=120)

    def tokens(self, prompt: Any, **body: Any) -> list[int]:
        answer = self.post("completions", prompt=prompt, return_token_ids=True, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]
