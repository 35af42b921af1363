"""Trains one policy for a point of a front: DPO on the pairs of two objectives, mixed in that point's shares.

    PYTHONPATH=benchmarks python benchmarks/baselines/per_point.py BASE PAIRS OUTPUT --second OTHER_PAIRS --share 0.5
        [--max-pairs N]

The loss, the LoRA and its schedule are those of dpo.py. With `--share a`, training reads N pairs: round(a · N) of
PAIRS, the rest of OTHER_PAIRS. By default N is the largest number for which both files have enough pairs. The policy
decodes by `dpo.plain`, like any other model. A front of k points takes k trainings; guided decoding takes two ARMs
for all points, and each request sets its own weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from baselines.dpo import beta_option, trained
from baselines.pairs import command_line, split
from genarm_fast.train.data import Pair


def most(first: int, second: int, share: float) -> int:
    """Return the largest N with round(share · N) at most `first` and the rest of N at most `second`."""
    return max(n for n in range(first + second + 1) if _parts(n, share)[0] <= first and _parts(n, share)[1] <= second)


def mixed(first: Sequence[Pair], second: Sequence[Pair], share: float, count: int | None = None) -> list[Pair]:
    """Return `count` pairs drawn at random with a fixed seed: round(share · count) of `first`, the rest of `second`.

    count: by default the largest that the pairs allow, see `most`.

    Raises:
        ValueError: a share outside [0, 1], or a count below 1 or above what the pairs allow.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected a number from 0 to 1")
    limit = most(len(first), len(second), share)
    count = limit if count is None else count
    if not 1 <= count <= limit:
        held = f"{len(first)} and {len(second)} pairs"
        raise ValueError(f"count={count}: expected 1 to {limit}, of {held} at share={share:g}")
    draw = random.Random(0)
    taken = [draw.sample(list(pairs), n) for pairs, n in zip((first, second), _parts(count, share))]
    return [*taken[0], *taken[1]]  # the trainer shuffles the rows


def _parts(count: int, share: float) -> tuple[int, int]:
    of_first = round(share * count)
    return of_first, count - of_first


def main() -> None:
    parser = command_line(__doc__)
    beta_option(parser)
    parser.add_argument("--second", required=True, help="preference pairs of the other objective")
    parser.add_argument("--share", type=float, required=True, help="of the first objective, from 0 to 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (first, first_held), (second, second_held) = (split(path, args.holdout_every) for path in (args.pairs, args.second))
    try:
        training = mixed(first, second, args.share, args.max_pairs)
    except ValueError as error:
        parser.error(str(error))
    held_out = {"held_out": first_held[: args.held_out_pairs], "held_out_second": second_held[: args.held_out_pairs]}
    trained(args, training, held_out, share=args.share, of_first=_parts(len(training), args.share)[0])


if __name__ == "__main__":
    main()
