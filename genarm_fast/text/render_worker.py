"""A process that renders chat templates that may take any time and memory: its parent ends it, and limits its memory.

Frames of 8 bytes of length and as many of data: in come pickles of the parent's own, out goes JSON, which runs nothing.
"""

from __future__ import annotations

import json
import pickle
import sys
from contextlib import suppress
from typing import Any

MOST_BYTES = 1 << 32  # of addresses; the interpreter with transformers' templates has mapped a tenth of that


def main() -> None:
    sys.path.pop(0)  # this folder, whose modules have common names
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ValueError, OSError):  # a lower limit is there already
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))

    def reply(value: Any) -> None:
        data = json.dumps(value).encode()
        replies.write(len(data).to_bytes(8, "little") + data)
        replies.flush()

    reply("ready")
    while size := requests.read(8):
        most, options = pickle.loads(requests.read(int.from_bytes(size, "little")))
        try:
            text = render_jinja_template(**options)[0][0]
            reply({"text": text} if len(text) <= most else {"characters": len(text)})
        except MemoryError:
            reply({"error": "MemoryError", "message": f"it takes more than {MOST_BYTES >> 20} MiB"})
        except Exception as error:
            reply({"error": type(error).__name__, "message": str(error)[:1000]})


if __name__ == "__main__":
    main()
