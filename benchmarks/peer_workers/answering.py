"""What every peer's process does: reads options, loads, then decodes as it is told, and says how long that took.

Lines of JSON over stdin and stdout. A peer's environment may lack every package of ours, so this module needs none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# prompts (token ids), new tokens for each, seed -> tokens that it made
Decode = Callable[[list[list[int]], int, int], int]


def answer(load: Callable[..., Decode]) -> None:
    """load(**options) returns what decodes. Whatever else prints goes to stderr."""
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
