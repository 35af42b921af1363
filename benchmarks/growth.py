"""Measures a step as rows, context and ARMs grow, for every way of holding weights on the CPU, and Hugging Face's step.

    python benchmarks/growth.py [MODEL] [--rows N ...] [--contexts TOKENS ...] [--arms N ...] [--prompts TOKENS ...]
        [--ways WAY ...] [--lora FOLDER ...] [--steps N] [--turns N] [--json FILE] [--plot FILE] [--full]

The default is a short form with the demo's base and its LoRA ARMs. --full has up to 64 rows, up to 8,000 tokens of
context, and all ways. A figure is CPU milliseconds of one thread without drafts: the median of turns, in which the ways
follow each other. Rows have 24 tokens of context. ARMs are lanes of the base, on --arm-rows rows. "hf" is transformers'
own forward of the base alone, in bfloat16, without guidance. The time of a prompt is that of the base alone, the first
token included.

With --json every figure is written as soon as it is measured, and a stopped run continues from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from result_files import processor
from transformers import AutoModelForCausalLM

from genarm_fast import ARM, GenARM, SamplingParams, demo

WAYS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    **{way: (torch.bfloat16, way) for way in ("exact", "int8", "int4")},
}
HF = "hf"
SHORT: dict[str, list[int]] = {"rows": [1, 8, 32], "contexts": [100, 1000], "arms": [0, 1, 3], "prompts": []}
FULL: dict[str, list[int]] = {
    "rows": [1, 2, 4, 8, 16, 32, 64],
    "contexts": [100, 500, 1000, 2000, 4000, 8000],
    "arms": [0, 1, 2, 3],
    "prompts": [100, 1000],
}
LABELS = {
    "rows": "rows of a step",
    "contexts": "tokens of context, one row",
    "arms": "LoRA ARMs",
    "prompts": "tokens of a prompt",
}


class Ours:
    """A `GenARM` that holds its weights in one way. Each request chooses how many of the ARMs guide it."""

    def __init__(self, source: Any, way: str, arms: list[Any], most: int) -> None:
        dtype, quantization = WAYS[way]
        specs = [ARM(arm, name=f"arm{i}") for i, arm in enumerate(arms)]
        options: dict[str, Any] = {"dtype": dtype, "device": "cpu", "quantization": quantization}
        self.model = GenARM.from_pretrained(source, specs, max_batch_size=most, speculation="off", **options)

    def step(self, prompts: list[list[int]], arms: int, steps: int) -> float:
        """Return the CPU milliseconds of a step, measured once all rows have their first token."""
        weights = {name: float(i < arms) for i, name in enumerate(self.model.arm_names)}
        params = SamplingParams(max_new_tokens=steps + 64, temperature=0.0, ignore_eos=True, weights=weights)
        tokens, start, last = [0] * len(prompts), 0.0, 0
        for chunk in self.model.stream(prompts, params):
            tokens[chunk.index] += len(chunk.token_ids)
            if not start and all(tokens):
                start, last, first = time.process_time(), chunk.index, tokens[chunk.index]
            elif start and chunk.index == last and tokens[last] - first >= steps:
                return (time.process_time() - start) * 1e3 / (tokens[last] - first)
        raise AssertionError("the stream ended before its tokens came")

    def prompt(self, prompt: list[int]) -> float:
        alone = dict.fromkeys(self.model.arm_names, 0.0)
        start = time.process_time()
        self.model.generate([prompt], max_new_tokens=1, temperature=0.0, ignore_eos=True, weights=alone)
        return (time.process_time() - start) * 1e3


class HuggingFace:
    """The forward of the base by transformers, with transformers' own cache."""

    def __init__(self, source: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False).eval()

    @torch.inference_mode()
    def _run(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        begin = time.process_time()
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        start = time.process_time()
        for _ in range(steps):
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self.model(tokens, past_key_values=out.past_key_values, use_cache=True)
        return (start - begin) * 1e3, (time.process_time() - start) * 1e3 / max(steps, 1)

    def step(self, prompts: list[list[int]], arms: int, steps: int) -> float:
        return self._run(prompts, steps)[1]

    def prompt(self, prompt: list[int]) -> float:
        return self._run([prompt], 0)[0]


class Figures:
    """The measured figures, {way: {axis: {value: [milliseconds of each turn]}}}, kept in a file if `path` is given."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.found: dict[str, dict[str, dict[str, list[float]]]] = {}
        if path is not None and path.exists():
            read = json.loads(path.read_text())
            same = {name: value for name, value in read["about"].items() if name != "date"}
            if same != {name: value for name, value in about.items() if name != "date"}:
                raise SystemExit(f"{path}: measured otherwise ({same}): expected {about}, or another file")
            self.found = read["ms"]

    def turns(self, way: str, axis: str, value: int) -> list[float]:
        return self.found.setdefault(way, {}).setdefault(axis, {}).setdefault(str(value), [])

    def add(self, way: str, axis: str, value: int, milliseconds: float) -> None:
        self.turns(way, axis, value).append(milliseconds)
        if self.path is not None:
            partial = self.path.with_name(f"{self.path.name}.part")
            partial.write_text(json.dumps({"about": self.about, "ms": self.found}, indent=1))
            partial.replace(self.path)

    def medians(self, axis: str) -> dict[str, dict[int, float]]:
        return {
            way: {int(value): statistics.median(turns) for value, turns in axes.get(axis, {}).items() if turns}
            for way, axes in self.found.items()
        }


Point = tuple[str, str, int]  # (way, axis, value)


def missing(figures: Figures, ways: list[str], plan: dict[str, list[int]], turns: int) -> Iterator[Point]:
    """Yield the points that are still to be measured, turn by turn; the ways follow each other at every value."""
    for turn in range(turns):
        for axis, values in plan.items():
            for value in values:
                for way in ways:
                    if len(figures.turns(way, axis, value)) <= turn and not (way == HF and axis == "arms" and value):
                        yield way, axis, value


def measure(figures: Figures, contenders: dict[str, Any], plan: dict[str, list[int]], options: Any) -> None:
    most = max(options.arm_rows, *plan["rows"], 1)
    longest = max([24, *plan["contexts"], *plan["prompts"]])
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(each.model.config.vocab_size if isinstance(each, HuggingFace) else each.model.vocab_size
                     for each in contenders.values())  # fmt: skip
    tokens = torch.randint(vocabulary // 4, vocabulary, (longest + most,), generator=generator).tolist()
    for way, axis, value in missing(figures, list(contenders), plan, options.turns):
        contender, rows = contenders[way], value if axis == "rows" else options.arm_rows if axis == "arms" else 1
        context = value if axis == "contexts" else 24
        if axis == "prompts":
            figures.add(way, axis, value, contender.prompt(tokens[:value]))
        else:
            prompts = [tokens[row : row + context] for row in range(rows)]
            figures.add(way, axis, value, contender.step(prompts, value if axis == "arms" else 0, options.steps))


def show(figures: Figures, plan: dict[str, list[int]]) -> None:
    for axis in (axis for axis, values in plan.items() if values):
        found = figures.medians(axis)
        columns = sorted({value for line in found.values() for value in line})
        print(f"\n| CPU ms, {LABELS[axis]} | {' | '.join(map(str, columns))} |\n|{'---|' * (len(columns) + 1)}")
        for way, line in found.items():
            print(f"| {way} | {' | '.join(f'{line[c]:.1f}' if c in line else '–' for c in columns)} |")


def plot(figures: Figures, plan: dict[str, list[int]], path: Path) -> None:
    """Draw a picture for each axis of a step.

    It shows ratios to the first figure of bfloat16: a busy machine disturbs them less than milliseconds."""
    import matplotlib.pyplot as plt

    axes_of = [axis for axis in ("rows", "contexts", "arms") if plan[axis]]
    size = (4.5 * len(axes_of), 3.8)
    figure, pictures = plt.subplots(1, len(axes_of), figsize=size, layout="constrained", squeeze=False)
    for picture, axis in zip(pictures[0], axes_of):
        found = {way: line for way, line in figures.medians(axis).items() if line}
        least = min(min(line) for line in found.values())
        unit = found.get("bfloat16", next(iter(found.values())))
        unit = unit.get(least, min(unit.values()))
        for way, line in found.items():
            at = sorted(line)
            style, label = ("s--", "Hugging Face, unguided") if way == HF else ("o-", way)
            picture.plot(at, [line[value] / unit for value in at], style, label=label)
        picture.set(xlabel=LABELS[axis], ylabel=f"a step, bfloat16 at {least} = 1")
        if axis == "rows":
            picture.set(yscale="log")
        else:
            picture.set_ylim(0, None)
        if axis != "arms":
            picture.set(xscale="log")
        picture.set_xticks(sorted({value for line in found.values() for value in line}))
        picture.xaxis.set_major_formatter("{x:.0f}")
        picture.xaxis.set_minor_formatter("")
        picture.grid(alpha=0.3)
    pictures[0][0].legend(fontsize=8)
    about = figures.about
    figure.suptitle(f"{about['machine']}, one thread, CPU time, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id (default: the demo's base)")
    parser.add_argument("--full", action="store_true", help=f"{FULL} and all ways")
    for axis, values in SHORT.items():
        parser.add_argument(f"--{axis}", type=int, nargs="*", help=f"default: {values}")
    parser.add_argument("--arm-rows", type=int, default=8, help="rows of a step with ARMs (default: 8)")
    parser.add_argument("--lora", nargs="+", help="adapters of the model (default: the demo's, of the demo's base)")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, HF], help="default: bfloat16, exact and hf")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="figures; what is there already is not measured again")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    defaults = FULL if options.full else SHORT
    plan = {axis: defaults[axis] if getattr(options, axis) is None else getattr(options, axis) for axis in SHORT}
    ways = options.ways or ([*WAYS, HF] if options.full else ["bfloat16", "exact", HF])
    loras = options.lora or ([] if options.model else [demo.arm(name) for name in ("positive", "concise", "harmless")])
    plan["arms"] = [count for count in plan["arms"] if count <= len(loras)]
    source = options.model or demo.base()
    about = {
        "model": Path(source).name,
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "steps": options.steps,
        "arm rows": options.arm_rows,
        "date": date.today().isoformat(),
    }
    figures = Figures(options.json, about)
    needed = {way for way, *_ in missing(figures, ways, plan, options.turns)}
    most = max(options.arm_rows, *plan["rows"], 1)
    own = loras if any(plan["arms"]) else []
    contenders = {
        way: HuggingFace(source) if way == HF else Ours(source, way, own, most) for way in ways if way in needed
    }
    if contenders:
        measure(figures, contenders, plan, options)
    show(figures, plan)
    if options.plot is not None:
        plot(figures, plan, options.plot)


if __name__ == "__main__":
    main()
