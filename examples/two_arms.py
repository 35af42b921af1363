"""Weight two objectives differently in each request, and plot the reward of both: the front.

python examples/two_arms.py [--base FOLDER] [--arms FOLDER FOLDER] [--plot front.png]
"""

import argparse
import statistics

import matplotlib.pyplot as plt

from genarm_fast import ARM, GenARM, SamplingParams, demo

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arms", nargs=2, default=[demo.arm("positive"), demo.arm("concise")])
parser.add_argument("--plot", default="front.png")
parser.add_argument("--seeds", type=int, default=8)
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()

model = GenARM.from_pretrained(args.base or demo.base(), [ARM(a, name=n) for a, n in zip(args.arms, "ab")])
chat = [{"role": "user", "content": "How was your stay at the hotel?"}]
mixes = [(2 * (1 - share), 2 * share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
run = {"max_new_tokens": args.max_new_tokens, "rewards": True}
params = [SamplingParams(weights=mix, seed=seed, **run) for mix in mixes for seed in range(args.seeds)]
outputs = iter(model.generate([chat] * len(params), params))  # one call decodes all requests

points = []
for mix in mixes:
    texts = [next(outputs) for _ in range(args.seeds)]
    means = [statistics.mean(t.rewards[name].total / len(t.token_ids) for t in texts) for name in "ab"]
    points.append(means)
    print(f"weights {mix}: reward a token of a {means[0]:.2f}, of b {means[1]:.2f}; {texts[0].text[:60]!r}")
plt.plot(*zip(*points), marker="o")
plt.xlabel("reward a token of a")
plt.ylabel("reward a token of b")
plt.savefig(args.plot)
