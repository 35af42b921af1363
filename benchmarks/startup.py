"""Times the phases from process start to the first token, beside Hugging Face's load and first token.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [CONTENDER ...] [--base FOLDER] [--rounds 3] [--json]

Each run is a process of its own, and contenders take turns. After a first round, which does not count, files are in
memory and modules are compiled, as after an installation. The table has medians of CPU time, which other processes
change little, and of the whole wall-clock time. genarm_fast imports some modules at once that transformers imports
while it reads a model, so compare the sums of the lines `import` and `read`.
Without --base, the demo's base is used, with the ARMs `small` (a model) and `positive` (a LoRA adapter). Hugging Face's
contenders load the adapter by PEFT. With `small`, both models generate a token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "How was the film that you saw last night?"
LINES = ("python", "import", "read", "check", "place", "first token")
CONTENDERS = {  # name -> (ARMs, whether the self-check finds its record; None for Hugging Face)
    "Hugging Face, base": ([], None),
    "Hugging Face, base + small": (["small"], None),
    "Hugging Face, base + positive": (["positive"], None),
    "base": ([], True),
    "base, no record": ([], False),
    "base + small": (["small"], True),
    "base + positive": (["positive"], True),
}


class Clock:
    """The CPU seconds of each line of the table. `end` ends a line and begins the next one."""

    def __init__(self) -> None:
        self.last, self.lines = 0.0, dict.fromkeys(LINES, 0.0)

    def end(self, line: str) -> None:
        now = time.process_time()
        self.lines[line], self.last = now - self.last, now


def hugging_face(base: str, arms: list[str], clock: Clock) -> None:
    """Load the models and generate a token with each, by transformers; adapters are loaded by PEFT."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapters = [arm for arm in arms if Path(arm, "adapter_config.json").exists()]
    if adapters:
        from peft import PeftModel
    clock.end("import")
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).eval()
        for source in (base, *(arm for arm in arms if arm not in adapters))
    ]
    for adapter in adapters:
        models[0] = PeftModel.from_pretrained(models[0], adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    clock.end("read")
    with torch.inference_mode():
        for model in models:
            model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=True, pad_token_id=0)
    clock.end("first token")


def ours(base: str, arms: list[str], clock: Clock) -> None:
    from genarm_fast import GenARM
    from genarm_fast.engine import owner

    check = owner.check_models

    def timed(*members: Any) -> None:
        clock.end("read")
        check(*members)
        clock.end("check")

    owner.check_models = timed
    clock.end("import")
    model = GenARM.from_pretrained(base, arms)
    model.engine()
    clock.end("place")
    with model.stream(PROMPT, max_new_tokens=1) as stream:
        next(stream)
    clock.end("first token")


def child(kind: str, base: str, arms: list[str]) -> None:
    """Run one contender in this process and print its CPU seconds as JSON."""
    clock = Clock()
    clock.end("python")
    if CONTENDERS[kind][1] is None:
        hugging_face(base, arms, clock)
    else:
        ours(base, arms, clock)
    print(json.dumps(clock.lines))


def measure(kinds: list[str], base: str, arms: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each line, by contender and line."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(rounds + 1):
            first = turn % len(kinds)
            for kind in kinds[first:] + kinds[:first]:
                names, recorded = CONTENDERS[kind]
                setting = "once" if recorded else "always"
                variables = {"GENARM_FAST_CACHE": cache, "GENARM_FAST_SELFCHECK": setting, "TQDM_DISABLE": "1"}
                inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
                command = [sys.executable, __file__, "--child", kind, base, *(arms[name] for name in names)]
                start = time.perf_counter()
                result = subprocess.run(
                    command, env=inherited | variables, check=True, stdout=subprocess.PIPE, text=True
                )
                wall = time.perf_counter() - start
                if turn:  # round 0 reads files from the disk, and writes the self-check's records
                    lines = json.loads(result.stdout.splitlines()[-1])
                    found[kind].append(lines | {"total": sum(lines.values()), "wall, with exit": wall})
    return {
        kind: {line: statistics.median(run[line] for run in runs) for line in runs[0]} for kind, runs in found.items()
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="contender", help=f"{', '.join(CONTENDERS)}; default: all")
    parser.add_argument("--base", help="a copy of the demo's model elsewhere")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kinds = args.contenders or list(CONTENDERS)
    if unknown := set(kinds) - set(CONTENDERS):
        parser.error(f"{min(unknown)!r}: expected some of {', '.join(CONTENDERS)}")
    from genarm_fast import demo

    arms = {name: str(demo.arm(name)) for names, _ in CONTENDERS.values() for name in names}
    found = measure(kinds, args.base or str(demo.base()), arms, args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "seconds": found}, indent=1))
        return
    print(f"| CPU seconds | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}")
    for line in (*LINES, "total", "wall, with exit"):
        print(f"| {line} | {' | '.join(f'{lines[line]:.2f}' for lines in found.values())} |")


if __name__ == "__main__":
    main()
