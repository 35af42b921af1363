"""Run EleutherAI's lm-evaluation-harness on guided text: a task of your own, without and with an ARM.

pip install lm-eval vaderSentiment, then, in the clone,
python examples/harness.py [--base FOLDER] [--arm FOLDER]
"""

import argparse
from functools import partial
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast import ARM, demo
from genarm_fast.integrations.transformers import guided

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=None, help="hub id or folder; default: the demo's, fetched once")
parser.add_argument("--arm", default=demo.arm("positive"), help="of the base, or a whole model with its tokenizer")
parser.add_argument("--limit", type=int, default=None, help="so many of the task's texts")
args = parser.parse_args()
folder = args.base or demo.base()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
# The task consists of three files: its YAML, its data, and its metric.
manager = TaskManager(include_path=str(Path(__file__).with_name("harness")), include_defaults=False)
generate = model.generate
for name, weight in (("base", None), ("guided, weight 1", 1.0), ("guided, weight 2", 2.0)):
    if weight is not None:  # the harness calls only `model.generate`
        arm = ARM(args.arm, weight=weight)
        model.generate = partial(generate, custom_generate=guided(arm, tokenizer=tokenizer))
    lm = HFLM(model, tokenizer=tokenizer, batch_size=4, max_length=512)
    found = simple_evaluate(lm, tasks=["cheerful"], task_manager=manager, limit=args.limit, bootstrap_iters=0)
    print(f"{name}: mood {found['results']['cheerful']['mood,none']:+.3f}")
