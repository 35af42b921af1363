"""Generate a first guided text: a base model alone, then the same model steered by a reward model.

python examples/first_text.py [--base FOLDER] [--arm FOLDER]
"""

import argparse

from genarm_fast import ARM, GenARM, demo

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arm", default=demo.arm("positive"), help="of a reward model")
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()

model = GenARM.from_pretrained(args.base or demo.base(), [ARM(args.arm, name="positive")])
chat = [{"role": "user", "content": "What did you think of the film?"}]
for weight in (0.0, 1.5):
    output = model.generate([chat], weights=weight, seed=1, max_new_tokens=args.max_new_tokens, rewards=True)[0]
    print(f"weight {weight}: {output.text}")
    print(f"  reward {output.rewards['positive'].total:.1f}, {output.usage.completion_tokens} tokens\n")
