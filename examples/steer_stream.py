"""Change the weights of a stream while it runs, then give the same schedule of weights as a list beforehand.

python examples/steer_stream.py [--base FOLDER] [--arm FOLDER]
"""

import argparse

from genarm_fast import ARM, GenARM, demo

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arm", default=demo.arm("positive"), help="of a reward model")
parser.add_argument("--max-new-tokens", type=int, default=40)
args = parser.parse_args()

model = GenARM.from_pretrained(args.base or demo.base(), ARM(args.arm, name="positive"), speculation="off")
chat = [{"role": "user", "content": "How was the long flight home?"}]
run = {"seed": 2, "max_new_tokens": args.max_new_tokens}
with model.stream(chat, weights=2.0, **run) as stream:
    for count, chunk in enumerate(stream, 1):
        print(chunk.text, end="", flush=True)
        if count == 10:  # a negative weight steers away from the ARM: a weight may be any real number
            stream.set_weights({"positive": -2.0})
print()
steered = stream.output

# A list has one weight for each token, and its last weight repeats. It may stand wherever an ARM's weight may.
(planned,) = model.generate([chat], weights={"positive": [2.0] * 10 + [-2.0]}, **run)
print([weight for (weight,) in planned.completions[0].weights])
assert planned.token_ids == steered.token_ids
