"""A process that renders chat templates which may take any time and memory.

Its parent ends it when it takes too long; the process limits its own memory. Both directions use frames: 8 bytes with
the length, then the data. Requests are pickles made by the parent. Replies are JSON, because reading JSON runs no code.
"""

from __future__ import annotations

import json
import pickle
import sys
from contextlib import suppress
from typing import Any

# Limit of the address space. The interpreter with transformers' templates has mapped a tenth of that.
MOST_BYTES = 1 << 32


def main() -> None:
    sys.path.pop(0)  # removes this folder, whose modules have common names
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ValueError, OSError):  # a lower limit is set already
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
