"""Use guided sampling in your own decode loop, and the whole engine in `model.generate`.

python examples/drop_in.py [--base FOLDER] [--arm FOLDER]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast import demo
from genarm_fast.integrations.transformers import guided
from genarm_fast.kernels import guided_sample

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arm", default=demo.arm("small"), help="of a whole model with the base's tokenizer")
parser.add_argument("--max-new-tokens", type=int, default=20)
args = parser.parse_args()
folder = args.base or demo.base()
tokenizer = AutoTokenizer.from_pretrained(folder)
base, arm = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, args.arm))
prompt = tokenizer("The film was", return_tensors="pt").input_ids

torch.manual_seed(0)
ids, caches = prompt, [None, None]
with torch.inference_mode():
    for _ in range(args.max_new_tokens):
        fed = ids if caches[0] is None else ids[:, -1:]
        outputs = [m(fed, past_key_values=c, use_cache=True) for m, c in zip((base, arm), caches)]
        caches = [output.past_key_values for output in outputs]
        logits, arm_logits = (output.logits[:, -1] for output in outputs)
        # This replaces: probs = (logits / 0.8).softmax(-1); token = torch.multinomial(probs, 1)[:, 0]
        token = guided_sample(logits, arm_logits, 1.0, temperature=0.8, top_p=0.95).tokens
        ids = torch.cat([ids, token[:, None]], dim=-1)
print(tokenizer.decode(ids[0]))

run = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": args.max_new_tokens}
print(tokenizer.decode(base.generate(prompt, custom_generate=guided(arm, tokenizer=tokenizer), **run)[0]))
