"""Compares ops on random input with their references, under sanitizers or in Triton's interpreter between canaries.

    python scripts/fuzz_ops.py [--seconds 300] [--seed N] [--core sanitized|installed] [--triton] [--json FILE]

`make sanitize` runs both forms. Each case has a seed of its own. For a failed case the script prints the option that
repeats this case alone (--case).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
import sanitized_core  # noqa: E402


def sampling(rng: random.Random, triton: bool) -> None:
    import torch

    from genarm_fast.kernels import guided_sample, guided_sample_reference

    rows, block, arms = rng.randint(0, 4), rng.choice([None, 1, 3]), rng.choice([0, 1, 2, 5])
    vocab = rng.choice([1, 2, 17, 1023, 1024, 1025, rng.randint(1, 2500)])
    shape = (rows,) if block is None else (rows, block)
    # Each member has a vocabulary size and thus a row stride of its own, so that rows start at unaligned places.
    padded = [torch.randn(*shape, vocab + rng.randint(0, 5)) * 3 for _ in range(arms + 1)]
    if rng.random() < 0.2 and rows:
        padded[0][0] = rng.choice([-torch.inf, torch.nan])
    base, *others = padded
    options = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.7]), "seeds": rng.getrandbits(63), "positions": rng.getrandbits(32),
        "return_logprobs": True, "top_logprobs": min(rng.choice([0, 3]), vocab),
    }  # fmt: skip
    options |= {"top_k": rng.randint(1, 2000)} if rng.random() < 0.3 else {}
    options |= {"top_p": rng.uniform(0.01, 1.0)} if rng.random() < 0.3 else {}
    options |= {"min_p": rng.uniform(0.0, 0.5)} if rng.random() < 0.3 else {}
    weights = [rng.choice([0.0, 1.0, -0.7]) for _ in range(arms)]
    expected = guided_sample_reference(base, others, weights, **options)
    if triton:
        from canaries import Canaries

        from genarm_fast.kernels.guided_sample.arguments import SamplingArguments, check
        from genarm_fast.kernels.guided_sample.triton import launch

        canaries = Canaries()
        arguments = SamplingArguments(canaries.embed(base), tuple(map(canaries.embed, others)), weights, **options)
        check(arguments)
        found = _with_canaries(canaries, lambda: launch(arguments))
    else:
        found = guided_sample(base, others, weights, **options)
    assert found.status.tolist() == expected.status.tolist()
    different = found.tokens != expected.tokens  # a near tie may give another token, but hardly twice in a case
    assert int(different.sum()) <= 1, (found.tokens, expected.tokens)
    if not different.any():
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=5e-5, equal_nan=True)


def settling(rng: random.Random, triton: bool) -> None:
    import torch

    from genarm_fast.kernels import settle, settle_reference

    rows, width = rng.randint(0, 40), rng.randint(1, 9)
    ends = torch.iinfo(torch.int64)
    lengths = torch.tensor([rng.choice([0, 5, -5, ends.max - 2, ends.max, ends.min]) for _ in range(rows)]).long()
    targets = torch.randint(0, 12, (rows, width))
    drafts = torch.where(torch.rand(rows, width - 1) < 0.2, 50, targets[:, :-1])
    rest = {
        "lengths": lengths,
        "limits": torch.tensor([rng.choice([3, 9, ends.max, ends.min]) for _ in range(rows)]).long(),
        "finished": torch.rand(rows) < 0.1,
        "stop_ids": torch.randint(-1, 12, (rows, 2)) if rng.random() < 0.5 else torch.tensor([3, -1]),
        "draft_counts": torch.randint(0, width, (rows,)) if rng.random() < 0.5 else None,
    }
    expected = settle_reference(targets, drafts, **rest)
    if triton:
        from canaries import Canaries

        from genarm_fast.kernels.settle.triton import launch

        canaries = Canaries()
        found = _with_canaries(canaries, lambda: launch(canaries.embed(targets), canaries.embed(drafts), **rest))
    else:
        found = settle(targets, drafts, **rest)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def lookups(rng: random.Random, triton: bool) -> None:
    import torch

    from genarm_fast.kernels import ngram_lookup, ngram_lookup_reference

    rows, width, kinds = rng.randint(0, 8), rng.randint(1, 90), rng.randint(1, 8)
    tokens = torch.randint(0, kinds, (rows, width))
    ends = torch.iinfo(torch.int64)
    lengths = torch.tensor([rng.choice([0, 1, width, rng.randint(0, width), ends.max, ends.min]) for _ in range(rows)])
    least = rng.randint(1, 3)
    arguments = lengths.long(), rng.randint(0, 9), rng.randint(least, 6), least
    lengths, k, longest, least = arguments
    expected = ngram_lookup_reference(tokens, lengths, k, max_n=longest, min_n=least)
    if triton:
        from canaries import Canaries

        from genarm_fast.kernels.ngram_lookup.triton import launch

        canaries = Canaries()
        found = _with_canaries(canaries, lambda: launch(canaries.embed(tokens), *arguments))
    else:
        found = ngram_lookup(tokens, lengths, k, max_n=longest, min_n=least)
    assert torch.equal(found, expected)


def _with_canaries(canaries: object, launch: Callable[[], object]) -> object:
    from unittest.mock import patch

    import torch

    with patch.object(torch, "empty", canaries.allocate):
        found = launch()
    assert canaries.untouched(), "memory outside a buffer was written"
    return found


def cases(triton: bool) -> dict[str, Callable[[random.Random, bool], None]]:
    import fuzz_layers
    from fuzz_decoders import decoders

    own = {"sampling": sampling, "settling": settling, "lookups": lookups, **fuzz_layers.CASES}
    return own if triton else own | fuzz_layers.ONLY_ON_THE_CPU | {"decoders": decoders}


def fuzz(seconds: float, seed: int, triton: bool, only: str | None = None) -> Counter[str]:
    """Run cases and return their counts by op and by instruction set.

    Raises AssertionError for the first wrong case, with the seed of the case."""
    import torch

    from genarm_fast.kernels import _native

    sets = _native.core.instruction_sets() if _native.core is not None and not triton else ["interpreter"]
    known = cases(triton)
    rng, done, end = random.Random(seed), Counter[str](), time.monotonic() + seconds
    rest: list[str] = []
    while time.monotonic() < end or rest or not done:  # whole rounds, so that a short run has every case
        if not rest:
            rest = rng.sample(list(known), len(known))
        name, case, isa = rest.pop(), rng.getrandbits(48), rng.choice(sets)
        if only is not None:
            (name, isa), case, end, rest = only.split(":")[:2], int(only.split(":")[2]), 0.0, []
        if isa != "interpreter":
            _native.core.use(isa)
        torch.manual_seed(case)
        # If a sanitizer ends the process, the last printed line names the case.
        print(f"{name}:{isa}:{case}", file=sys.stderr, flush=True)
        try:
            known[name](random.Random(case), triton)
        except Exception as error:
            raise AssertionError(f"{name} is wrong or failed: repeat it with --case {name}:{isa}:{case}") from error
        done.update([name, f"on {isa}"])
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--core", choices=("sanitized", "installed"), default="sanitized")
    parser.add_argument("--triton", action="store_true", help="Triton's kernels in its interpreter, not the C++ core")
    parser.add_argument("--case", metavar="OP:SET:SEED", help="one case alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # path of the core that the outer process built, or "-"
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    if args.inside is None and (args.core == "sanitized" or args.triton):
        sys.exit(_outer(args, seed))
    if args.inside not in (None, "-"):
        sanitized_core.load(args.inside)
    done = fuzz(args.seconds, seed, args.triton, args.case)
    what = "Triton interpreter, canaries" if args.triton else f"C++ core, {args.core}"
    report = {"what": what, "seed": seed, "seconds": args.seconds, "cases": dict(done), "date": f"{date.today()}"}
    report |= {"processor": platform.processor() or platform.machine(), "clean": True}
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def _outer(args: argparse.Namespace, seed: int) -> int:
    """Build the sanitized core, run this file over it in a new process, and return that process's exit status.

    With --triton, run it in Triton's interpreter instead. If the run fails, print the end of its stderr."""
    command = [sys.executable, __file__, "--seconds", str(args.seconds), "--seed", str(seed)]
    command += [
        part for name in ("case", "json") if getattr(args, name) for part in (f"--{name}", str(getattr(args, name)))
    ]
    with tempfile.TemporaryDirectory() as folder:
        if args.triton:
            command, env = [*command, "--triton", "--inside", "-"], os.environ | {"TRITON_INTERPRET": "1"}
        else:
            if reason := sanitized_core.missing():
                print(f"fuzz_ops: {reason}: nothing was checked", file=sys.stderr)
                return 0
            command, env = [*command, "--inside", str(sanitized_core.build(Path(folder)))], sanitized_core.environment()
        print(f"fuzz_ops: seed {seed}", file=sys.stderr)
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    main()
