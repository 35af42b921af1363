"""Pairs as token ids: templates, EOS and length limits, formatted as decoding formats them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from .config import TrainConfig
from .data import TURN, Message, Pair


@dataclass(frozen=True)
class Encoded:
    """Token ids of one pair; complete responses end with EOS."""

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Encoder:
    """Turns pairs into token ids for one tokenizer and one config."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, stop_ids: frozenset[int] = frozenset()):
        self.tokenizer = tokenizer
        self.config = config
        self.chat_template = config.chat_template or tokenizer.chat_template
        self.stop_ids = stop_ids
        if tokenizer.eos_token_id is None:
            raise ValueError(f"base={config.base!r}: expected a tokenizer with an EOS token")
        if config.as_chat and self.chat_template is None:
            raise ValueError("as_chat=True: expected a tokenizer with a chat template, or chat_template")

    def __call__(self, pairs: list[Pair]) -> tuple[list[Encoded], Counter[str]]:
        """Encoded pairs within the limits, and why the others were dropped."""
        config = self.config
        kept: list[Encoded] = []
        dropped: Counter[str] = Counter()
        for pair in pairs:
            prompt, chosen, rejected = self.encode(pair)
            if max(len(chosen), len(rejected)) > config.max_response_tokens:
                dropped["response too long"] += 1
                continue
            if len(prompt) > config.max_prompt_tokens:
                if config.long_prompts == "drop":
                    dropped["prompt too long"] += 1
                    continue
                dropped["prompt truncated, kept"] += 1
                bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
                prompt = bos + prompt[len(prompt) - config.max_prompt_tokens + len(bos) :]
            kept.append(Encoded(pair.row, prompt, chosen, rejected))
        return kept, dropped

    def encode(self, pair: Pair) -> tuple[list[int], list[int], list[int]]:
        """Prompt, chosen and rejected token ids, without limits."""
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if isinstance(prompt, str) and self.config.as_chat:
            messages = transcript_messages(prompt)
            if messages:
                chosen, rejected = chosen.strip(), rejected.strip()
            prompt = messages or [{"role": "user", "content": prompt}]
        chat = not isinstance(prompt, str)
        ids = self._chat(prompt) if not isinstance(prompt, str) else self._text(prompt)
        if not ids:
            raise ValueError(
                f"row {pair.row}: the prompt has no tokens and the tokenizer adds none: nothing predicts the response"
            )
        end = self._end_of_turn() if chat else int(self.tokenizer.eos_token_id)
        sides = []
        for text, complete in ((chosen, pair.chosen_complete), (rejected, pair.rejected_complete)):
            response = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            sides.append([*response, end] if complete else response)
        return ids, sides[0], sides[1]

    def _text(self, prompt: str) -> list[int]:
        template = self.config.prompt_template
        text = prompt if template is None else template.replace("{prompt}", prompt)
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]

    def _render(self, messages: list[Message], **kwargs: Any) -> str:
        if self.chat_template is None:
            raise ValueError("the data has chat messages: expected a tokenizer with a chat template, or chat_template")
        text = self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False, **kwargs)
        return cast(str, text)

    def _chat(self, messages: list[Message]) -> list[int]:
        return self.tokenizer(self._render(messages, add_generation_prompt=True), add_special_tokens=False)["input_ids"]

    def _end_of_turn(self) -> int:
        """The stop token that the template puts after an answer (Llama 3's is not its EOS), else EOS."""
        answer = "ANSWER"
        text = self._render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}])
        after = self.tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        eos = int(self.tokenizer.eos_token_id)
        return after[0] if after and after[0] in self.stop_ids else eos


def transcript_messages(prompt: str) -> list[Message]:
    """Chat messages of an HH transcript that ends with an open assistant turn; [] for any other text."""
    if not prompt.endswith(TURN) or not prompt.startswith("\n\nHuman:"):
        return []
    messages: list[Message] = []
    for turn in prompt.removesuffix(TURN).split("\n\nHuman:")[1:]:
        human, *answers = turn.split(TURN)
        messages.append({"role": "user", "content": human.strip()})
        messages.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return messages
