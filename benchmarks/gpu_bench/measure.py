"""What rows are measured with: models that stay on the device, decoding by ours and Hugging Face's, and W."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from genarm_fast import GenARM, SamplingParams
from genarm_fast.speculation.config import Speculation

from .models import Pair, plain_tokenizer, random_llama, weight_bytes, with_lora
from .settings import Setting

Call = Callable[[int], Any]  # tokens; does it all, waiting for the device


def synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    start = synchronized()
    call()
    return synchronized() - start


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Device time of one of these calls, launched one after the other; median of repeats."""
    found = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        for call in calls:
            call()
        end.record(torch.cuda.current_stream())
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(found[1:])


class Bench:
    """What rows have in common. `leave` forgets the models and decoders of a group of rows."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.turn = 0
        self.read_speed = 0.0  # bytes per second
        self.so_far: dict[str, Any] = {}  # numbers of the running row, which may be cut short
        self.keep: Callable[[dict[str, Any]], None] = lambda so_far: None  # puts them where they outlive the process
        self._models: dict[str, PreTrainedModel] = {}
        self._decoders: dict[Any, GenARM] = {}
        self._pair: Pair | None = None

    def note(self, **found: Any) -> None:
        """Keep numbers of the running row, in case that it is cut short."""
        self.so_far |= found
        self.keep(dict(self.so_far))

    def model(self, name: str, seed: int = 0) -> PreTrainedModel:
        if name not in self._models:
            self._models[name] = random_llama(self.setting, name, seed)
        return self._models[name]

    def pair(self) -> Pair:
        self._pair = self._pair or Pair(self.setting)
        return self._pair

    def decoder(self, key: str, base: PreTrainedModel, arms: Sequence[Any] = (), rows: int = 32, **more: Any) -> GenARM:
        """A GenARM over models on the device, which it may stack; kept until the group is left."""
        if key not in self._decoders:
            tokenizer = more.pop("tokenizer", None) or plain_tokenizer(base.config.vocab_size)
            limits: dict[str, Any] = {"max_batch_size": rows, "speculation": "off"}
            self._decoders[key] = GenARM.from_pretrained(base, list(arms), tokenizer=tokenizer, **limits, **more)
        return self._decoders[key]

    def lanes(self, name: str, count: int) -> GenARM:
        """A random model with so many random LoRA ARMs, all of one forward."""
        key = f"{name} + {count}"
        if key in self._decoders:
            return self._decoders[key]
        if not count:
            return self.decoder(key, self.model(name))
        base = random_llama(self.setting, name)  # of its own: the A of its lanes are rows of the stacked weights
        return self.decoder(key, base, [with_lora(base, 1 + i, self.setting.rank) for i in range(count)])

    def leave(self) -> None:
        """Forget all models. Raises what an earlier error of the GPU makes every later call raise."""
        torch.cuda.synchronize()
        for decoder in self._decoders.values():
            decoder.release()
        self._decoders.clear()
        self._models.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def w(self, base: PreTrainedModel) -> float:
        """Milliseconds that reading its weights once takes, at the speed that was measured in this process."""
        if not self.read_speed:
            self.read_speed = read_speed(self.setting)
        return 1e3 * weight_bytes(base) / self.read_speed

    def prompts(self, rows: int, length: int, vocab: int) -> list[list[int]]:
        """New ones at each call, since the beginning of a prompt that a slot still holds is not read again."""
        self.turn += 1
        generator = torch.Generator().manual_seed(self.turn)
        return torch.randint(2, vocab, (rows, length), generator=generator).tolist()

    def decode(
        self, model: GenARM, rows: int = 1, *, context: int | None = None, speculation: Any = "off",
        prompts: Sequence[list[int]] | None = None, rounds: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Milliseconds a step of so many requests, or a token of one with drafts; its factor of W; peak memory."""
        torch.cuda.reset_peak_memory_stats()
        rounds, context = rounds or self.setting.rounds, context or self.setting.context
        outputs: list[Any] = []
        base = model.base.model

        def generate(tokens: int) -> None:
            given = self.prompts(rows, context, model.vocab_size)
            if prompts is not None:
                given = [prompts[(self.turn + row) % len(prompts)] for row in range(rows)]
            each = [
                SamplingParams(max_new_tokens=tokens, ignore_eos=True, seed=1000 * self.turn + row)
                for row in range(rows)
            ]
            outputs[:] = model.generate(given, each, speculation=speculation)

        counts = {"rounds": 0, "drafted": 0, "accepted": 0, "tokens": 0}

        def counted() -> None:
            for output in outputs:
                for name in ("rounds", "drafted", "accepted"):
                    counts[name] += getattr(output.rounds, name)
                counts["tokens"] += len(output.token_ids)

        found = per_token(generate, self.setting.tokens, rounds, counted)
        result = {"rows": rows, "context": context, **found, "w": self.w(base), "peak_bytes": peak_bytes()}
        result |= {"x_w": found["ms"] / result["w"], "runs_by": runs_by(model)}
        if speculation != "off":
            result["acceptance"] = counts["accepted"] / max(counts["drafted"], 1)
            result["tokens_per_step"] = counts["tokens"] / max(counts["rounds"], 1)
        return result

    def hugging_face(self, name: str, *, compiled: bool = False) -> dict[str, Any]:
        """Measure its `generate` on the same model, unguided, one request."""
        model = self.model(name)
        torch.cuda.reset_peak_memory_stats()
        found = per_token(
            partial(hf_generate, self, model, compiled=compiled), self.setting.hf_tokens, min(2, self.setting.rounds)
        )
        w = self.w(model)
        return {"rows": 1, "context": self.setting.context, **found, "w": w, "x_w": found["ms"] / w,
                "peak_bytes": peak_bytes()}  # fmt: skip


def hf_generate(bench: Bench, model: Any, tokens: int, *, length: int | None = None, compiled: bool = False) -> None:
    ids = torch.tensor(bench.prompts(1, length or bench.setting.context, model.config.vocab_size)).to(model.device)
    options: dict[str, Any] = {}
    if compiled:
        config = CompileConfig(**bench.setting.compile_options)
        config._compile_all_devices = True  # on a trial's CPU, too
        options = {"cache_implementation": "static", "compile_config": config}
    model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **options,
    )  # fmt: skip


def per_token(
    generate: Call, tokens: tuple[int, int], rounds: int, ran: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Milliseconds a token, of the larger number of tokens less the smaller: no prefill in it. The first, and largest,
    call is not timed: it compiles, captures, and makes the caches."""
    few, many = tokens
    warm_up = seconds_of(partial(generate, many))
    times = []
    for _ in range(rounds):
        long = seconds_of(partial(generate, many))
        ran()
        times.append(1e3 * (long - seconds_of(partial(generate, few))) / (many - few))
    spread = (max(times) - min(times)) / 2
    return {"ms": statistics.median(times), "ms_spread": spread, "warm_up_seconds": round(warm_up, 2)}


def read_speed(setting: Setting) -> float:
    """Bytes per second of reading memory once: the fastest of five sums over more than a cache holds."""
    numbers = torch.ones(setting.read_bytes // 4, dtype=torch.float32, device=setting.device)
    numbers.sum()
    return max(numbers.nbytes / max(1e-6 * microseconds([numbers.sum], 1), 1e-9) for _ in range(5))


def runs_by(model: GenARM) -> list[str]:
    """Which forward each member has, and why, in the library's words."""
    return list(model.forwards.values())


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated()


def drafting(drafter: str, k: int | None) -> Any:
    return "auto" if k is None else Speculation(drafter, k)
