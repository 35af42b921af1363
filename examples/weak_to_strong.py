"""Let a small reward model steer a larger base and draft for it (weak to strong). Drafts change no token.

python examples/weak_to_strong.py [--base FOLDER] [--arm FOLDER]
"""

import argparse
import time

from genarm_fast import ARM, GenARM, demo

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arm", default=demo.arm("small"), help="of a small model with the base's tokenizer")
parser.add_argument("--max-new-tokens", type=int, default=60)
args = parser.parse_args()

model = GenARM.from_pretrained(args.base or demo.base(), ARM(args.arm, name="small", weight=1.0))
chat = [{"role": "user", "content": "Tell me about your garden."}]
texts = {}
for speculation in ("off", "auto"):
    start = time.perf_counter()
    (output,) = model.generate([chat], seed=3, max_new_tokens=args.max_new_tokens, speculation=speculation)
    texts[speculation] = output.token_ids
    rounds = output.rounds
    print(f"speculation={speculation}: {len(output.token_ids)} tokens in {rounds.rounds} steps,", end=" ")
    print(f"{rounds.accepted} of {rounds.drafted} drafts right, {time.perf_counter() - start:.1f} s")
print(output.text)
assert texts["off"] == texts["auto"]
