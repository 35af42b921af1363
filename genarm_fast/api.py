"""The public API: load a base and its ARMs once, then generate, stream and score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from genarm_fast.device.base import on_host
from genarm_fast.engine.async_calls import AsyncCalls
from genarm_fast.engine.config import EngineConfig
from genarm_fast.engine.scoring import score_responses
from genarm_fast.engine.selfcheck import self_check_policy
from genarm_fast.engine.stream import Stream, completed, outputs_of
from genarm_fast.models.arm import ARM, as_arms
from genarm_fast.models.loader import load_members
from genarm_fast.models.quantized import check_quantization
from genarm_fast.outputs import GenerationOutput, ScoreOutput
from genarm_fast.params import SamplingParams
from genarm_fast.speculation.config import Speculation, as_speculation
from genarm_fast.text.given import as_prompts
from genarm_fast.utils.checks import check_flag
from genarm_fast.utils.collector import collector_waits
from genarm_fast.utils.progress import progress_bar

ModelSource = str | os.PathLike[str] | nn.Module


class GenARM(AsyncCalls):
    """A frozen base model steered by autoregressive reward models (arXiv 2410.08193).

    Attributes: base and arms (`Member`s), tokenizer (the base's), vocab_size (number of tokens that all members share;
    no token beyond them is drawn), eos_token_ids, max_batch_size, cache_bytes, max_step_ms.
    """

    @classmethod
    def from_pretrained(
        cls,
        base: ModelSource,
        arms: ModelSource | ARM | Sequence[ModelSource | ARM] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_template: str | None = None,
        chat_template: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        quantization: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int = 16,
        cache_bytes: int | None = None,
        max_step_ms: float | None = None,
        speculation: str | Speculation = "auto",
        draft_model: ModelSource | None = None,
        warm_up: bool = False,
        **model_kwargs: Any,
    ) -> GenARM:
        """Load the base and its ARMs. An adapter of a model that is loaded already shares the weights of that model.

        Args:
            base: hub id, local folder, PEFT adapter folder, or a loaded model (never modified; used in eval mode).
            arms: one or several models, each given like `base` or as an `ARM`.
            tokenizer, prompt_template, chat_template: the base's, instead of those in its folder.
            dtype, device_map, quantization_config, attn_implementation, model_kwargs: arguments of transformers'
                `from_pretrained`, used for every member that is not loaded yet. To load one member with other
                arguments, load it yourself and pass the model.
            quantization: how the matrices of bfloat16 members are held on the CPU. "exact" uses fewer bits where they
                restore a matrix bit for bit; "int8" and "int4" round it (docs/quantization.md). None keeps the
                matrices. Members that are loaded already stay as they are. `model.quantized` tells what was done.
            trust_remote_code: run Python code from the folder or repository of the base or the draft model. Without
                it, no such code runs. Each `ARM` has its own setting.
            device: the device of every member that is not loaded yet; default: CUDA if there is any, else the CPU.
            max_batch_size: most sequences that are decoded together; when one ends, a waiting one takes its slot.
            cache_bytes: most bytes that the key-value caches of all members may take together. A small limit lets
                fewer sequences be decoded or scored together; a sequence that does not fit alone fails. None: no limit
                but the memory of the device.
            max_step_ms: target for the longest step, in milliseconds, while prompts are prefilled beside requests that
                generate. Chunks of prompts are as large as it allows, of 16 tokens at least. None: 512 tokens.
            speculation: "auto" drafts tokens where measured cost and acceptance make that faster; "off"; or a
                `Speculation`. It never changes a token.
            draft_model: a small model with the base's vocabulary that only proposes tokens; given like `base`.
            warm_up: call `warm_up` with its defaults.

        Raises:
            ValueError: tokenizers that disagree on the common vocabulary, an adapter of another base, a kind of model
                without a key-value cache, a template without {prompt}.
            TypeError: an argument of the wrong type, or one that no member takes.
        """
        EngineConfig(max_batch_size, cache_bytes, max_step_ms)  # raises if a limit is wrong, before a model is loaded
        as_speculation(speculation)
        self_check_policy()
        check_quantization("quantization", quantization)
        if quantization is not None and quantization_config is not None:
            raise ValueError("quantization and quantization_config: expected one of them")
        warm_up = check_flag("warm_up", warm_up)
        specs = as_arms(arms)
        sources = (base, *(spec.model for spec in specs), draft_model)
        if model_kwargs and not any(isinstance(source, (str, os.PathLike)) for source in sources):
            raise TypeError(f"{min(model_kwargs)}: expected no such argument where all members are loaded already")
        loading = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "quantization_config": quantization_config,
            "quantization": quantization,
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code,
            **model_kwargs,
        }
        templates: dict[str, Any] = {"prompt_template": prompt_template, "chat_template": chat_template}
        limits: Any = {"max_batch_size": max_batch_size, "cache_bytes": cache_bytes, "max_step_ms": max_step_ms}
        with collector_waits(), on_host():
            members, draft = load_members(base, specs, draft_model, tokenizer=tokenizer, **templates, **loading)
            model = cls(members, **limits, speculation=speculation, draft_model=draft)
        if warm_up:
            model.warm_up()
        return model

    def __reduce__(self) -> Any:
        raise TypeError("GenARM: expected to be loaded anew in each process, it can't be pickled or copied")

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        speculation: str | Speculation | None = None,
        **overrides: Any,
    ) -> list[GenerationOutput]:
        """Return guided completions, one output per prompt in order.

        Args:
            prompts: a prompt or a list of prompts. A prompt is one of these:
                a string, which is put into each member's prompt_template, if it has one;
                a list of chat messages, for each member's chat template;
                {"messages", "tools", "chat_template_kwargs"}, a chat with arguments for the template;
                a list of token ids, the same for every member.
            sampling_params: one `SamplingParams` for all prompts, or one per prompt.
            progress: show a progress bar.
            speculation: "auto", "off" or a `Speculation`, instead of the model's. It never changes a token.
            overrides: fields of `SamplingParams` to replace; `tools` and `chat_template_kwargs` for all chats.

        Raises:
            TypeError, ValueError: before any work, naming the prompt, the argument and what was expected.
            GenerationError: if some requests failed, after all others finished. It holds the outputs of the others.
        """
        engine, groups = self._decoding(prompts, sampling_params, speculation, overrides)
        sequences = [sequence for group in groups for sequence in group]
        with progress_bar(len(sequences), progress) as advance, engine.run(sequences) as run:
            for advanced in run:
                advance(sum(sequence.ended for sequence in advanced))
        return outputs_of(groups, self.arm_names)

    def as_completed(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: str | Speculation | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, GenerationOutput | Exception]]:
        """Iterate over (index of the prompt, its output or the error that ended it), in the order of their ends.

        Arguments as in `generate`. To `close` or drop the iterator ends the requests that are still running.

        Raises:
            TypeError, ValueError: before any work, naming the prompt, the argument and what was expected.
        """
        engine, groups = self._decoding(prompts, sampling_params, speculation, overrides)
        return completed(engine, groups, self.arm_names)

    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: str | Speculation | None = None,
        **overrides: Any,
    ) -> Stream:
        """Stream the tokens of one or several prompts as they are drawn. As in `generate`, but n has to be 1."""
        engine, groups = self._decoding(prompts, sampling_params, speculation, overrides, True)
        return Stream(engine, [sequence for (sequence,) in groups], self.arm_names)

    def score(self, prompts: Any, responses: Any, *, append_eos: bool = True) -> list[ScoreOutput]:
        """Return the base's log-probabilities and the ARMs' rewards of given responses, token by token.

        Args:
            prompts: as in `generate`.
            responses: one per prompt: a string, or a list of token ids (scored as they are).
            append_eos: end string responses with the end-of-sequence token, as in training.

        Raises:
            TypeError, ValueError: before any work, naming prompt or response and what was expected.
            MemoryError: before any work, if the caches of one response alone take more than cache_bytes.
            RuntimeError: a member gives NaN or +inf.
        """
        config, append_eos = self._config(), check_flag("append_eos", append_eos)
        with on_host():
            return score_responses(
                self.members,
                as_prompts(prompts),
                responses,
                append_eos=append_eos,
                vocab_size=self.vocab_size,
                eos_token_ids=self.eos_token_ids,
                max_batch_size=config.max_batch_size,
                cache_bytes=config.cache_bytes,
            )
