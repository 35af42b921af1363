"""The responses of the methods that `quality` compares. They are made once, kept in files, and read again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from baselines.interface import Params
from baselines.likelihoods import log_likelihoods
from quality_measures import repetition
from quality_methods import Method, Models, Size


class Texts:
    """The responses of one method: texts, tokens [prompts, seeds], nats under the base [prompts, seeds], forwards.

    A method that ran on the first prompts only is compared with other methods on these prompts."""

    def __init__(self, run: dict[str, Any], seeds: int) -> None:
        samples = run["samples"]
        self.seeds, self.prompts = seeds, len(samples) // seeds
        self.texts = [sample["text"] for sample in samples]  # seed by seed
        self.tokens = self._by_prompt([sample["tokens"] for sample in samples])
        self.nats = self._by_prompt([sample.get("base_nats", np.nan) for sample in samples])
        self.forwards = run["forwards_per_token"]
        self.seconds = run["seconds"]

    def _by_prompt(self, values: Any) -> np.ndarray:
        return np.asarray(values, float).reshape(self.seeds, self.prompts).T

    def scores(self, judge: Any, prompts: int | None = None) -> np.ndarray:
        """Return the judge's score of each text, [prompts, seeds]. prompts: keep only the first `prompts` prompts."""
        return self._by_prompt(judge(self.texts))[:prompts]

    def repetition(self) -> np.ndarray:
        return self._by_prompt(repetition(self.texts))


def collect(
    models: Models,
    methods: dict[str, Method],
    folder: Path,
    prompts: list[list[int]],
    size: Size,
    perplexity: bool = True,
) -> dict[str, Texts]:
    """Run the methods that have no file in `folder` yet, and return the responses of all methods.

    Files hold texts, never prompts. perplexity: whether the base reads every text, to score it."""
    stops, tokenizer = tuple(models.engine.eos_token_ids), models.engine.tokenizer
    for name, method in methods.items():
        path = folder / f"{name}.json"
        if path.exists():
            continue
        samples, forwards, start = [], {}, time.process_time()
        for seed in range(size.seeds):
            responses = method(prompts, Params(size.tokens, seed=10_000 * seed, stop_token_ids=stops))
            for response in responses:
                forwards.update({m: forwards.get(m, 0) + n for m, n in response.forwards.items()})
                samples.append({"ids": response.tokens, "tokens": len(response.tokens)})
        seconds = time.process_time() - start
        if perplexity:
            asked = prompts[: len(samples) // size.seeds] * size.seeds
            for sample, nats in zip(samples, log_likelihoods(models.base, asked, [s["ids"] for s in samples])):
                sample["base_nats"] = nats
        for sample in samples:
            sample["text"] = tokenizer.decode(sample.pop("ids"), skip_special_tokens=True)
        total = sum(sample["tokens"] for sample in samples)
        result = {
            "samples": samples,
            "seconds": seconds,
            "forwards_per_token": {member: count / total for member, count in forwards.items()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        os.replace(partial, path)
        print(f"{name}: {total} tokens in {seconds:.0f} s of CPU time", flush=True)
    return {name: Texts(json.loads((folder / f"{name}.json").read_text()), size.seeds) for name in methods}


def same_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Keep a note in the folder of the inputs of its runs: the size, and each adapter or ARM by name.

    New names, such as the adapter of one more row, are added. Raises SystemExit if an input differs from the note.
    """
    note, now = folder / "inputs.note", json.loads(json.dumps(inputs))
    kept = json.loads(note.read_text()) if note.exists() else now
    adapters = kept["adapters"] | {n: now["adapters"][n] for n in now["adapters"].keys() - kept["adapters"].keys()}
    changed = ["size"] if kept["size"] != now["size"] else []
    if changed := changed + [name for name, digest in now["adapters"].items() if adapters[name] != digest]:
        raise SystemExit(f"{note}: made with another {', '.join(changed)}: expected another --runs")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"size": kept["size"], "adapters": adapters}, indent=1))
