"""The short forms of the benchmarks that compare with another contender: `make bench` runs them.

    OMP_NUM_THREADS=1 python benchmarks/short.py [NAME ...] [--rounds N] [--json FILE]

A short form has a few shapes. The long form is a script of its own, with all shapes, models and options. There is no
short form of startup.py (it starts a process per turn), soak.py (it has no contender), compiled_kernels.py (it times
nothing), and of inflated bases.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from attention import transformers_attention
from decode import naive
from peft import PeftModel
from registry import Case, benchmark, main
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import genarm_fast
from genarm_fast import GenARM, demo
from genarm_fast.kernels import guided_sample as sample
from genarm_fast.kernels import ragged_attention, rms_norm, settle, settle_reference, silu_mul
from genarm_fast.kernels.arm_logps import arm_logps as logps
from genarm_fast.kernels.arm_logps import arm_logps_reference
from genarm_fast.kernels.small_linear import SmallLinear
from kernels import TEMPERATURE, eager

PROMPT, TOKENS = "How was the film that you saw last night?", 8


@benchmark
def guided_sample() -> Iterator[Case]:
    """Draws of a token from base and ARM logits. The long form is kernels.py."""
    for vocab, rows, mode in ((32000, 1, "draw"), (128256, 1, "draw"), (32000, 8, "draw"), (32000, 1, "log-probs")):
        members = [3 * torch.randn(rows, vocab).to(torch.bfloat16) for _ in range(2)]
        options: dict[str, Any] = {"temperature": TEMPERATURE, "seeds": 1, "positions": torch.arange(rows)}
        options["return_logprobs"] = mode == "log-probs"
        runs = {
            "ours": lambda m=members, o=options: sample(m[0], m[1:], [1.0], **o),
            "eager": lambda m=members, mode=mode: eager(m, [1.0], mode),
            "multinomial": lambda m=members, mode=mode: eager(m, [1.0], mode, multinomial=True),
        }
        yield Case(f"V={vocab}, {rows} rows, {mode}", runs)


@benchmark
def accepting() -> Iterator[Case]:
    """A call of settle with eight rows of four drafts. The long form is kernels.py."""
    targets = torch.arange(40).view(8, 5)
    rows: dict[str, Any] = {"lengths": targets[:, 0], "limits": targets[:, 4] + 9, "finished": targets[:, 0] < 0}
    rows |= {"stop_ids": torch.tensor([99]), "draft_counts": torch.full((8,), 4)}
    runs = {
        "ours": lambda: settle(targets, targets[:, :4], **rows),
        "PyTorch": lambda: settle_reference(targets, targets[:, :4], **rows),
    }
    yield Case("8 rows, 4 drafts", runs)


@benchmark
def small_linear() -> Iterator[Case]:
    """Products of few rows with a bfloat16 weight that stays in the caches. The long form is linear.py."""
    for rows, inputs, outputs in ((1, 576, 1536), (8, 576, 1536), (1, 2048, 5632)):
        weight, x = torch.randn(outputs, inputs).to(torch.bfloat16), torch.randn(rows, inputs).to(torch.bfloat16)
        ours = SmallLinear(weight)
        runs = {"ours": lambda f=ours, x=x: f(x), "PyTorch": lambda w=weight, x=x: functional.linear(x, w)}
        yield Case(f"{rows} x {inputs} -> {outputs}", runs)


@benchmark
def arm_logps() -> Iterator[Case]:
    """The training loss, forward and backward, with a frozen head. The long form is arm_logps.py."""
    hidden, weight = torch.randn(2, 64, 256, requires_grad=True), torch.randn(16384, 256) / 20
    labels = torch.randint(0, 16384, (2, 64))

    def step(function: Any) -> None:
        function(hidden, weight, labels).sum().backward()

    yield Case("[2, 64, 16384]", {"ours": lambda: step(logps), "full logits": lambda: step(arm_logps_reference)})


@benchmark
def attention() -> Iterator[Case]:
    """Attention over the static cache. The long form is attention.py."""
    for rows, length in ((1, 256), (8, 256), (1, 1024)):
        keys, values = torch.randn(2, rows, 3, length, 64).to(torch.bfloat16)
        query = torch.randn(rows, 1, 9, 64).to(torch.bfloat16).transpose(1, 2)
        positions, slots = torch.full((rows, 1), length - 1), torch.arange(rows)
        mask = (torch.arange(length) <= positions[:, :, None])[:, None]
        runs = {
            "ours": lambda q=query, k=keys, v=values, s=slots, p=positions: ragged_attention(
                q, k, v, s, p, scale=0.125
            ),
            "transformers": lambda q=query, k=keys, v=values, m=mask: transformers_attention(q, k, v, m, 0.125),
        }
        yield Case(f"{rows} rows, length {length}", runs)


@benchmark
def layer_ops() -> Iterator[Case]:
    """The norm and the activation of a decoder layer. The long form is decode_ops.py."""
    x, weight, eps = torch.randn(1, 576).to(torch.bfloat16), torch.ones(576, dtype=torch.bfloat16), 1e-5
    gate, up = torch.randn(2, 1, 1536).to(torch.bfloat16)
    norm = LlamaRMSNorm(576, eps).to(torch.bfloat16)

    yield Case("rms_norm, 576", {"ours": lambda: rms_norm(x, weight, eps), "transformers": lambda: norm(x)})
    yield Case("silu_mul, 1536", {"ours": lambda: silu_mul(gate, up), "PyTorch": lambda: functional.silu(gate) * up})


@cache
def demo_model(*arms: str, quantization: str | None = None) -> GenARM:
    folders = [demo.arm(name) for name in arms]
    return GenARM.from_pretrained(demo.base(), folders, speculation="off", quantization=quantization)


EXACT = None if torch.cuda.is_available() else "exact"


def texts(model: GenARM, **params: Any) -> Any:
    return model.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, seed=1, **params)


@benchmark
def decoding() -> Iterator[Case]:
    """Eight tokens at batch 1 with a LoRA ARM as a lane. The long form is decode.py.

    "ours" holds weights in 4 bits wherever that is exact."""
    model, exact = demo_model("positive"), demo_model("positive", quantization=EXACT)
    bare = AutoModelForCausalLM.from_pretrained(demo.base(), dtype=torch.bfloat16, trust_remote_code=False)
    merged = PeftModel.from_pretrained(bare, str(demo.arm("positive"))).merge_and_unload().eval()
    base, prompt = model.base.model, torch.tensor([model.prepare(PROMPT)[0].token_ids[0]])
    limits = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    runs = {
        "ours": lambda: texts(exact, weights=[1.0]),
        "ours, unguided": lambda: texts(exact, weights=[0.0]),
        "ours, bfloat16": lambda: texts(model, weights=[1.0]),
        "two models, naive": lambda: naive([base, merged], [1.0, 1.0], prompt, TOKENS),
        "Hugging Face, unguided": lambda: base.generate(prompt, attention_mask=torch.ones_like(prompt), **limits),
    }
    yield Case("SmolLM2-135M, positive", runs)


@benchmark
def drafting() -> Iterator[Case]:
    """Decoding with drafts of the small ARM, at w = 2. The long form is speculation.py."""
    model = demo_model("small", quantization=EXACT)
    auto = genarm_fast.GenARM(model.members, speculation="auto")
    runs = {"ours": lambda: texts(auto, weights=[2.0]), "no drafts": lambda: texts(model, weights=[2.0])}
    yield Case("SmolLM2-135M, small", runs)


@benchmark
def calls() -> Iterator[Case]:
    """The function `generate`, which keeps its models, and the method. The long form is call_overhead.py."""
    model, folders = demo_model("small"), (str(demo.base()), [str(demo.arm("small"))])
    params: dict[str, Any] = {"max_new_tokens": 2, "ignore_eos": True, "seed": 1, "speculation": "off"}
    runs = {
        "ours": lambda: genarm_fast.generate(*folders, PROMPT, **params),
        "GenARM.generate": lambda: model.generate(PROMPT, **params),
    }
    yield Case("2 tokens", runs)


if __name__ == "__main__":
    main()
