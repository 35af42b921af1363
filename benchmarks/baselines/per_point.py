"""One policy trained for each point of a front: DPO on the pairs of two objectives, mixed in the point's shares.

    python benchmarks/baselines/per_point.py BASE PAIRS OUTPUT --second OTHER_PAIRS --share 0.5 [--max-pairs N]

The loss, the LoRA and its schedule are dpo.py's. A point of `--share a` sees round(a · N) pairs of PAIRS and the rest
of OTHER_PAIRS; N is by default the most for which neither file is too short. The result decodes as any model does, by
`dpo.plain`. A front of k points takes k trainings, where guided decoding takes two ARMs and a number a request.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from baselines.dpo import beta_option, trained
from baselines.pairs import command_line, split
from genarm_fast.train.data import Pair


def most(first: int, second: int, share: float) -> int:
    """The largest N of which round(share · N) pairs are at most `first`, and the others at most `second`."""
    return max(n for n in range(first + second + 1) if _parts(n, share)[0] <= first and _parts(n, share)[1] <= second)


def mixed(first: Sequence[Pair], second: Sequence[Pair], share: float, count: int | None = None) -> list[Pair]:
    """`count` pairs, of which round(share · count) are of `first`; drawn at random with a fixed seed. Default: `most`.

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
    return [*taken[0], *taken[1]]  # the trainer shuffles


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
