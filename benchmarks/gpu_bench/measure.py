"""The tools of the rows: models that stay on the device, decoding by the library and by Hugging Face, and W."""

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

Call = Callable[[int], Any]  # generates this number of tokens, and returns when the device has finished


def synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], Any]) -> float:
    start = synchronized()
    call()
    return synchronized() - start


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Return the device time in µs of one of these calls, launched back to back: the median of the repeats."""
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
    """The state that rows share. `leave` forgets the models and decoders of a group of rows."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.turn = 0
        self.read_speed = 0.0  # bytes per second
        self.so_far: dict[str, Any] = {}  # numbers of the running row, which may be stopped
        self.keep: Callable[[dict[str, Any]], None] = lambda so_far: None  # sends `so_far` out of the process
        self._models: dict[str, PreTrainedModel] = {}
        self._decoders: dict[Any, GenARM] = {}
        self._pair: Pair | None = None

    def note(self, **found: Any) -> None:
        """Keep numbers of the running row, in case the row is stopped before its end."""
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
        """Return a GenARM of models on the device, whose weights it may stack. It is kept until `leave`."""
        if key not in self._decoders:
            tokenizer = more.pop("tokenizer", None) or plain_tokenizer(base.config.vocab_size)
            limits: dict[str, Any] = {"max_batch_size": rows, "speculation": "off"}
            self._decoders[key] = GenARM.from_pretrained(base, list(arms), tokenizer=tokenizer, **limits, **more)
        return self._decoders[key]

    def lanes(self, name: str, count: int) -> GenARM:
        """Return a decoder of a random model with `count` random LoRA ARMs, all run by one forward."""
        key = f"{name} + {count}"
        if key in self._decoders:
            return self._decoders[key]
        if not count:
            return self.decoder(key, self.model(name))
        # This decoder needs its own base, since the A matrices of its lanes become rows of the stacked weights.
        base = random_llama(self.setting, name)
        return self.decoder(key, base, [with_lora(base, 1 + i, self.setting.rank) for i in range(count)])

    def leave(self) -> None:
        """Forget all models. Raises the GPU's error if an earlier one has spoilt this process."""
        torch.cuda.synchronize()
        for decoder in self._decoders.values():
            decoder.release()
        self._decoders.clear()
        self._models.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def w(self, base: PreTrainedModel) -> float:
        """Return W: the milliseconds to read the base's weights once, at the read speed measured in this process."""
        if not self.read_speed:
            self.read_speed = read_speed(self.setting)
        return 1e3 * weight_bytes(base) / self.read_speed

    def prompts(self, rows: int, length: int, vocab: int) -> list[list[int]]:
        """Return new prompts at each call, since a slot that holds the beginning of a prompt does not read it again."""
        self.turn += 1
        generator = torch.Generator().manual_seed(self.turn)
        return torch.randint(2, vocab, (rows, length), generator=generator).tolist()

    def decode(
        self, model: GenARM, rows: int = 1, *, context: int | None = None, speculation: Any = "off",
        prompts: Sequence[list[int]] | None = None, rounds: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Measure the milliseconds of a step of `rows` requests, or of one request's token with drafts.

        Returns these milliseconds, W and their multiple of W, the peak memory, and what the drafts achieved.
        """
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
        """Measure Hugging Face's `generate` on the same model, unguided, for one request."""
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
        config._compile_all_devices = True  # a trial compiles on the CPU, too
        options = {"cache_implementation": "static", "compile_config": config}
    model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **options,
    )  # fmt: skip


def per_token(
    generate: Call, tokens: tuple[int, int], rounds: int, ran: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return the milliseconds of one token, without the prefill.

    The time is the difference between a call for many tokens and a call for few, over the difference of their tokens.
    The first call does not count, since it compiles, captures graphs and makes the caches.
    """
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
    """Return the bytes per second at which memory is read: the fastest of five sums over more than a cache holds."""
    numbers = torch.ones(setting.read_bytes // 4, dtype=torch.float32, device=setting.device)
    numbers.sum()
    return max(numbers.nbytes / max(1e-6 * microseconds([numbers.sum], 1), 1e-9) for _ in range(5))


def runs_by(model: GenARM) -> list[str]:
    """Return the library's sentences on which forward each member has, and why."""
    return list(model.forwards.values())


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated()


def drafting(drafter: str, k: int | None) -> Any:
    return "auto" if k is None else Speculation(drafter, k)
