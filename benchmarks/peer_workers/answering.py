"""The loop of every peer's process: it reads options, loads a model, then decodes on request and reports the time.

Requests and replies are lines of JSON on stdin and stdout. This module needs only the standard library, since a peer's
environment may lack all packages of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Takes (prompts as token ids, new tokens of each, seed) and returns the number of tokens that were made.
Decode = Callable[[list[list[int]], int, int], int]


def answer(load: Callable[..., Decode]) -> None:
    """Answer requests until stdin ends. load(**options) returns the Decode function. Other prints go to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    decode = load(**json.loads(sys.stdin.readline()))
    reply(ready=True)
    for line in sys.stdin:
        question = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        made = decode(question["prompts"], question["tokens"], question["seed"])
        reply(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, tokens=made)
