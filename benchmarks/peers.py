"""Compares guided decoding by this library with unguided decoding by llama.cpp, Hugging Face and vLLM, on the CPU.

    make peers [ARGS="--shape 1b --rows 1"]          makes the environment of llama.cpp, measures, and writes the table
    OMP_NUM_THREADS=1 python benchmarks/peers.py measure [--shape 135m|1b] [--rows 1 8] [--threads 1] [--rounds 5]
    python benchmarks/peers.py write                 from the newest result files into docs/quantization.md

Each contender is a process of its own in an environment of its own (`peer_workers/`). The processes take turns: all
but one sleep. A step's time is the time of 8 + n new tokens less that of 8, over n. The prompt's time is that of one
new token after a prompt of a thousand tokens. Both are CPU time of one thread; more --threads give wall-clock time.
Ratios are medians of the ratios within a round. The 1b shape is TinyLlama's with random Q4_1 weights. It is good for
speed only, so it has no ARM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peer_shapes import SHAPES, Shape
from registry import RESULTS
from result_files import fill, machine, name_of
from rich.console import Console

from genarm_fast import demo
from genarm_fast.bench.timing import interval, take_turns
from genarm_fast.cli.bench import QUESTIONS

HERE = Path(__file__).parent
ROOT, WORKERS = HERE.parent, HERE / "peer_workers"
PAGE = ROOT / "docs" / "quantization.md"
REFERENCE = "llama.cpp, Q4_0"
FORMATS = ("Q4_0", "Q4_1", "Q8_0")  # formats in which llama.cpp is measured
SKIPPED_TOKENS, PROMPT_TOKENS, PROMPT_ROUNDS = 8, 1000, 2


@dataclass(frozen=True)
class Peer:
    """A contender: a script of peer_workers/, the python that runs it, and the script's options."""

    script: str
    python: Path
    options: Mapping[str, Any] = field(default_factory=dict)


class Process:
    """A peer that has loaded its model and waits for questions."""

    def __init__(self, name: str, peer: Peer, **options: Any) -> None:
        self.name = name
        command = [str(peer.python), str(WORKERS / peer.script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask(**options, **peer.options)

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()}; its words are above")
        return json.loads(reply)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def peers(shape: Shape, folder: Path) -> dict[str, Peer]:
    """Return the contenders by name, in the order of the table. folder: holds the models' files in other formats."""
    here = Path(sys.executable)
    llama, vllm = (ROOT / name / "bin" / "python" for name in (".venv-llama", ".venv-vllm"))
    if not llama.exists():
        raise SystemExit(f"{llama}: expected the environment of llama.cpp; `make peers` makes it")
    checkpoint = shape.checkpoint(folder)
    found = {"ours, base, bfloat16": Peer("of_genarm_fast.py", here, checkpoint)}
    for quantization in ("int8", "exact"):
        options = checkpoint | {"quantization": quantization}
        found[f"ours, base, {quantization}"] = Peer("of_genarm_fast.py", here, options)
    for title, arm in shape.arms.items():
        options = checkpoint | {"quantization": "exact", "arms": [str(demo.arm(arm))]}
        found[f"ours, {title}, exact"] = Peer("of_genarm_fast.py", here, options)
    for dtype in ("bfloat16", "float32"):
        found[f"Hugging Face, base, {dtype}"] = Peer("of_transformers.py", here, checkpoint | {"dtype": dtype})
    source = shape.gguf(folder)
    for name in FORMATS:
        path = source if name in source.name else folder / f"{source.stem}.{name}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            subprocess.run([llama, WORKERS / "of_llama_cpp.py", source, unfinished, name], check=True)
            unfinished.rename(path)
        found[f"llama.cpp, {name}"] = Peer("of_llama_cpp.py", llama, {"model": str(path)})
    if vllm.exists() and "gguf" not in checkpoint:
        found["vLLM, base, bfloat16"] = Peer("of_vllm.py", vllm, checkpoint)
    return found


def prompts_of(rows: int, turn: int) -> list[list[int]]:
    """Return token ids of questions in the chat template of the demo's base, cut at the front to one length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.base(), trust_remote_code=False)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS[:6]]
    found = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    length = min(map(len, found))
    return [found[(turn + i) % len(found)][-length:] for i in range(rows)]


def times(
    processes: Mapping[str, Process], rounds: int, ask: Callable[[Process, int], float]
) -> dict[str, list[float]]:
    """Return the result of `ask` for each process, by round. The clock of take_turns is the sum of these results."""
    reported = 0.0

    def run(process: Process, turn: int) -> None:
        nonlocal reported
        reported += ask(process, turn)

    runs = {name: partial(run, process) for name, process in processes.items()}
    return take_turns(runs, rounds, lambda: reported)


def measure(
    shape: Shape, rows: Sequence[int], threads: int, rounds: int, tokens: int, folder: Path
) -> Iterator[list[dict[str, Any]]]:
    """Yield the result lines of each case as soon as it is measured; see `lines_of`.

    The cases are a step at each number of rows, and with one row also a prompt."""
    clock, console = clock_of(threads), Console(stderr=True)
    for count in rows:

        def step(process: Process, turn: int, count: int = count) -> float:
            question = {"prompts": prompts_of(count, turn), "seed": turn}
            spent = [process.ask(**question, tokens=n)[clock] for n in (SKIPPED_TOKENS, SKIPPED_TOKENS + tokens)]
            return (spent[1] - spent[0]) / tokens

        def prompt(process: Process, turn: int) -> float:
            ids = [100 + (7919 * (turn + 1) * i) % 10_000 for i in range(PROMPT_TOKENS)]
            return process.ask(prompts=[ids], tokens=1, seed=turn)[clock]

        with ExitStack() as stack:
            processes = {}
            for name, peer in peers(shape, folder).items():
                console.print(f"{count} rows: {name} loads", highlight=False)
                processes[name] = stack.enter_context(Process(name, peer, rows=count, threads=threads))
            yield lines_of(f"step, {count} rows", times(processes, rounds, step))
            if count == 1:
                yield lines_of(f"prompt of {PROMPT_TOKENS} tokens", times(processes, PROMPT_ROUNDS, prompt))


def clock_of(threads: int) -> str:
    return "cpu" if threads == 1 else "wall"


def lines_of(case: str, spent: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a line per contender: its median milliseconds, and how many times as fast as REFERENCE it is."""
    return [
        {
            "case": case,
            "contender": name,
            "milliseconds": 1e3 * statistics.median(each),
            "times": vars(interval([b / a for a, b in zip(each, spent[REFERENCE])])),
        }
        for name, each in spent.items()
    ]


def table(found: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table, with a line about the machine above it."""
    about, lines = found["machine"], found["results"]
    cases = list(dict.fromkeys(line["case"] for line in lines))
    clock = "CPU time" if about["clock"] == "cpu" else "wall clock"
    text = [
        f"{SHAPES[about['shape']].title}: {about['date']}, {about['cores']} cores of an {about['device']} with"
        f" {about['capability']}, {about['threads']} thread(s), load {about['load']}; {clock}, medians of"
        f" {_rounds(found)} rounds. In brackets: how many times as fast as {REFERENCE}.\n",
        f"| milliseconds | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}",
    ]
    for name in dict.fromkeys(line["contender"] for line in lines):
        row = {line["case"]: line for line in lines if line["contender"] == name}
        cells = [f"{row[case]['milliseconds']:,.1f} ({row[case]['times']['median']:.2f})" for case in cases]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _rounds(found: Mapping[str, Any]) -> str:
    """Return the number of rounds, or its range, since runs of one day may have measured cases in different rounds."""
    each = sorted({line.get("rounds", found["machine"]["rounds"]) for line in found["results"]})
    return f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"


def with_new(found: Mapping[str, Any] | None, lines: Sequence[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Return `lines` and those of an earlier run of the same day whose cases `lines` lacks, in the table's order."""
    lines = [line | {"rounds": rounds} for line in lines]
    cases = {line["case"] for line in lines}
    earlier = [] if found is None else [{"rounds": found["machine"]["rounds"]} | line for line in found["results"]]
    kept = [line for line in earlier if line["case"] not in cases]
    return sorted([*kept, *lines], key=lambda line: _place(line["case"]))


def _place(case: str) -> tuple[int, str]:
    """Return the sort key of a case: a step of one row, then the prompt, then steps of more rows."""
    return (int(case.split()[1]) if case.startswith("step") else 2, case)


def write() -> None:
    """Write the tables of the newest result file of each shape, instruction set and number of threads into PAGE."""
    files = sorted((json.loads(path.read_text()) for path in RESULTS.glob("peers-*.json")), key=_date)
    newest = {tuple(found["machine"][each] for each in ("shape", "capability", "threads")): found for found in files}
    keys = sorted(newest, key=lambda key: (list(SHAPES).index(key[0]), *key[1:]))
    tables = "\n".join(table(newest[key]) for key in keys)
    PAGE.write_text(fill(PAGE.read_text(), {"peers": tables}))


def _date(found: Mapping[str, Any]) -> str:
    return found["machine"]["date"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "write"])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1, help="above one, the wall clock is read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="steps that are timed")
    parser.add_argument("--work", type=Path, help="keep files of other formats here, instead of making them each time")
    args = parser.parse_args()
    if args.action == "measure":
        options = {"threads": args.threads, "rounds": args.rounds, "tokens": args.tokens}
        about = machine() | options | {"clock": clock_of(args.threads), "shape": args.shape}
        name = f"peers-{args.shape}-{args.threads}-{about['date']}-{name_of(about)}-{about['capability'].lower()}"
        path = RESULTS / f"{name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else None
        lines: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as own:
            folder = args.work or Path(own)
            folder.mkdir(parents=True, exist_ok=True)
            for found in measure(SHAPES[args.shape], args.rows, **options, folder=folder):
                lines += found  # written after each case, since a run takes most of an hour
                result = {"machine": about, "results": with_new(earlier, lines, args.rounds)}
                path.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))
    write()


if __name__ == "__main__":
    main()
