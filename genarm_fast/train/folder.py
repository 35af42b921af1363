"""The output folder of a run: which run it belongs to, and values decided once for all its continuations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from genarm_fast.train.config import OPERATIONAL, TrainConfig, defaults
from genarm_fast.train.encode import Encoded
from genarm_fast.train.files import PARTIAL, read_json, with_keys, write_json


class RunFolder:
    """The run with this config and data in `config.output`, or the place for a new run, which `save` claims.

    Raises:
        ValueError: the folder holds something else, or another run.
    """

    def __init__(self, config: TrainConfig, training: list[Encoded], held_out: list[Encoded]) -> None:
        self.folder, self.path = config.folder, config.folder / "run.json"
        # Base and data are compared by content, not by name, because they may have moved.
        names = OPERATIONAL | {"base", "data", "dataset_split", "dataset_dir", "dataset_config", "eval_data"}
        self.identity: dict[str, Any] = {
            "config": {name: value for name, value in _plain(asdict(config)).items() if name not in names},
            "train_sha256": _digest(training),
            "held_out_sha256": _digest(held_out),
        }
        self.state: dict[str, Any] = {"identity": self.identity}
        if self.path.is_file():
            if config.resume == "never":
                raise ValueError(f"output={config.output!r} holds a run: expected another folder with resume='never'")
            self.state = read_json(self.path, "identity")
            identity = with_keys(self.path, self.state["identity"], "config", "train_sha256", "held_out_sha256")
            with_keys(self.path, identity["config"])
            self._check(config)
        else:
            check_folder(config)

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """Return the run's value for `name`, which is decided at its first start."""
        if name not in self.state:
            self.state[name] = decide()
        return self.state[name]

    def save(self) -> None:
        """Claim the folder, with the values that have been decided so far."""
        write_json(self.path, self.state)

    def report(self) -> dict[str, Any] | None:
        path = self.folder / "report.json"
        return read_json(path, "config", "dtype", "base_fingerprint", "data", "final") if path.is_file() else None

    def _check(self, config: TrainConfig) -> None:
        before = self.state["identity"]
        # An option that was added later had its default in the earlier run.
        options = _plain(defaults()) | before["config"]
        changed = [name for name, value in self.identity["config"].items() if options[name] != value]
        changed += [name for name in ("train_sha256", "held_out_sha256") if before[name] != self.identity[name]]
        if changed:
            raise ValueError(
                f"output={config.output!r} holds a run with other options or data (changed: {', '.join(changed)}): "
                "expected another folder, or the same options"
            )


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError for an output that is a file, or a folder that holds something else than a run."""
    folder = config.folder
    if not folder.exists() or (folder / "run.json").is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(PARTIAL) for path in folder.iterdir()):
        raise ValueError(f"output={config.output!r}: expected a new or empty folder, or one with a run to continue")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(values))


def _digest(pairs: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        margin = [pair.margin] if pair.margin else []
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected, *margin]).encode())
    return digest.hexdigest()
