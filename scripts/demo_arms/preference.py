"""Preference pairs as chat messages in a JSON-lines file, which `genarm-fast train` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


def to_record(prompt: str, chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    """Return one preference pair as chat messages."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(partial, path)
