"""Train on rows in memory, in TRL's preference format: chats, a margin, arguments of the chat template.

python examples/train_on_dataset.py [--base FOLDER]
"""

import argparse

from datasets import Dataset

from genarm_fast import demo
from genarm_fast.train import TrainConfig, train

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--pairs", type=int, default=64)
args = parser.parse_args()


def says(role, content):
    return {"role": role, "content": content}


films = ["western", "comedy", "drama", "cartoon", "thriller", "musical", "documentary", "short"]
rows = [
    {
        "prompt": [says("user", f"What did you think of {film} number {number}?")],
        "chosen": [says("assistant", f"A lovely {film}, I would see it again.")],
        "rejected": [says("assistant", f"A dull {film}, I left early.")],
        "margin": 0.5,  # the chosen response should win by this much
        "chat_template_kwargs": {"enable_thinking": False},
    }
    for number, film in zip(range(args.pairs), films * args.pairs)
]
data = Dataset.from_list(rows)  # load_dataset(...)["train"], a stream, or a list of dicts would do as well
config = TrainConfig(
    base=args.base or demo.base(), output="arms/of-rows", data_id="films", holdout_every=4, learning_rate=2e-3
)
result = train(config, data=data)
print(f"accuracy on held-out pairs: {result.report['before']['accuracy']:.2f} -> {result.accuracy:.2f}")
