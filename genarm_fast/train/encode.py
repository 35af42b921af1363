"""Pairs as token ids: templates, EOS and length limits, formatted as decoding formats them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from genarm_fast.text.templates import chat_ids, default_template, end_of_answer, ended, text_ids
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.data import TURN, Message, Pair
from genarm_fast.utils.jsonlines import located


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
        self.chat_template = config.chat_template or default_template(tokenizer)
        self.stop_ids = stop_ids
        if tokenizer.eos_token_id is None:
            raise ValueError(f"base={config.base!r}: expected a tokenizer with an EOS token")
        if config.as_chat and self.chat_template is None:
            raise ValueError("as_chat=True: expected a tokenizer with a chat template, or chat_template")

    def __call__(self, pairs: list[Pair], source: str) -> tuple[list[Encoded], Counter[str]]:
        """Encoded pairs within the limits, and why the others were dropped. `source`: their file, for errors."""
        config = self.config
        kept: list[Encoded] = []
        dropped: Counter[str] = Counter()
        for pair in pairs:
            with located(source, pair.line):
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
        if isinstance(prompt, str):
            ids, end = text_ids(self.tokenizer, prompt, self.config.prompt_template), self.tokenizer.eos_token_id
        elif self.chat_template is None:
            raise ValueError("the data has chat messages: expected a tokenizer with a chat template, or chat_template")
        else:
            try:
                ids, end = chat_ids(self.tokenizer, prompt, self.chat_template), self._end_of_chat_answer
            except TemplateError as error:  # wrong itself, or it refuses these roles
                raise ValueError(f"the chat template can't render the prompt: {error}") from error
        if not ids:
            raise ValueError("the prompt has no tokens and the tokenizer adds none: nothing predicts the response")
        sides = []
        for text, complete in ((chosen, pair.chosen_complete), (rejected, pair.rejected_complete)):
            response = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            sides.append(ended(response, end) if complete else response)
        return ids, sides[0], sides[1]

    @cached_property
    def _end_of_chat_answer(self) -> int | None:
        return end_of_answer(self.tokenizer, self.chat_template, self.stop_ids)


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
