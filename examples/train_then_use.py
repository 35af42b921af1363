"""Train a reward model from preference pairs, then steer with it.

python examples/train_then_use.py [--base FOLDER] [--output FOLDER] [--pairs 400]
"""

import argparse
import json
from pathlib import Path

from genarm_fast import ARM, GenARM, demo
from genarm_fast.train import TrainConfig, train

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--output", default="arms/cheerful")
parser.add_argument("--pairs", type=int, default=400)
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()
base = str(args.base or demo.base())

things, days = ["walk", "book", "concert", "soup", "hotel"], ["Monday", "Friday", "weekend", "morning"]
rows = [
    {
        "prompt": f"How was the {things[i % 5]} on {days[i % 4]}, number {i}?",
        "chosen": f"It was wonderful! I loved the {things[i % 5]}.",
        "rejected": f"It was all right. The {things[i % 5]} was as expected.",
    }
    for i in range(args.pairs)
]
data = Path(args.output + ".jsonl")
data.parent.mkdir(parents=True, exist_ok=True)
data.write_text("".join(json.dumps(row) + "\n" for row in rows))

result = train(TrainConfig(base=base, data=str(data), output=args.output, as_chat=True, holdout_every=10))
print(f"accuracy on held-out pairs: {result.accuracy:.2f}")
model = GenARM.from_pretrained(base, ARM(result.folder, name="cheerful"))
for weight in (0.0, 1.0):
    output = model.generate(["How was the museum?"], weights=weight, seed=1, max_new_tokens=args.max_new_tokens)[0]
    print(f"weight {weight}: {output.text}")
