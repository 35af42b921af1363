"""Turn pairs into token ids: templates, EOS and length limits, formatted as decoding formats them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from genarm_fast.text.messages import CONTENT_ALTERNATIVES, Message
from genarm_fast.text.templates import (
    Rendered,
    after_answer,
    default_template,
    end_of_answer,
    ended,
    render,
    rendered_chat,
    rendered_text,
    response_ids,
    token_ids,
)
from genarm_fast.text.transcripts import ASSISTANT, HUMAN, transcript_messages
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.formats import Pair, Side
from genarm_fast.train.rows import Dropped
from genarm_fast.utils.jsonlines import located


@dataclass(frozen=True)
class Encoded:
    """The token ids of one pair. Complete responses end with EOS. margin: as in `Pair`."""

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

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
        """Return the encoded pairs within the limits, and the reasons for dropping others, counted.

        source: the pairs' file, named in errors.
        """
        config = self.config
        kept: list[Encoded] = []
        dropped: Counter[str] = Counter()
        for pair in pairs:
            try:
                with located(source, pair.line):
                    prompt, chosen, rejected = self.encode(pair)
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
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
            kept.append(Encoded(pair.row, prompt, chosen, rejected, pair.margin))
        return kept, dropped

    def encode(self, pair: Pair) -> tuple[list[int], list[int], list[int]]:
        """Return prompt, chosen and rejected token ids, without limits.

        Raises:
            Dropped: a pair of which a template or a transcript loses a part.
            ValueError: no chat template, or one that fails; a prompt without tokens.
        """
        prompt, sides = pair.prompt, [pair.chosen, pair.rejected]
        options = self.options(pair)
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise Dropped("prompt that ends with the assistant's message, which decoding would continue")
        if isinstance(prompt, str) and self.config.as_chat:
            messages = transcript_messages(prompt)
            if messages:
                sides = [side.strip() if isinstance(side, str) else side for side in sides]
            elif HUMAN in prompt or ASSISTANT in prompt:
                raise Dropped("transcript that does not end where the assistant begins")
            prompt = messages or [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            rendered = rendered_text(self.tokenizer, prompt, self.config.prompt_template)
            texts, end = [str(side) for side in sides], self.tokenizer.eos_token_id
        elif self.chat_template is None:
            raise ValueError("the data has chat messages: expected a tokenizer with a chat template, or chat_template")
        else:
            try:
                rendered = rendered_chat(self.tokenizer, prompt, self.chat_template, **options)
                if "tools" in options:
                    others = {name: value for name, value in options.items() if name != "tools"}
                    if rendered == rendered_chat(self.tokenizer, prompt, self.chat_template, **others):
                        raise Dropped("the chat template leaves out 'tools'")
                texts = [self._answer(prompt, side, rendered, options) for side in sides]
            except Dropped:
                raise
            except ValueError as error:
                raise ValueError(f"the chat template can't render the prompt: {error}") from error
            end = self.end_of_chat_answer
        ids = token_ids(self.tokenizer, rendered)
        if not ids:
            raise ValueError("the prompt has no tokens and the tokenizer adds none: nothing predicts the response")
        if texts[0] == texts[1]:
            raise Dropped("chosen equals rejected")
        responses = []
        for text, complete in zip(texts, (pair.chosen_complete, pair.rejected_complete)):
            response = response_ids(self.tokenizer, rendered, ids, text)
            responses.append(ended(response, end) if complete else response)
        return ids, responses[0], responses[1]

    def options(self, pair: Pair) -> dict[str, Any]:
        """Return the arguments for the chat template of a pair. Its row's arguments override those of the config."""
        return {**(self.config.chat_template_kwargs or {}), **pair.options}

    def recorded(self, pairs: list[Pair]) -> dict[str, Any] | None:
        """Return the arguments that the template got for every pair alike, without tools; None if there are none.

        Decoding gives the template the same arguments.
        """
        options = [self.options(pair) for pair in pairs]
        alike = {
            name: value
            for name, value in (options[0] if options else {}).items()
            if name != "tools" and all(name in each and each[name] == value for each in options)
        }
        return alike or None

    def _answer(self, prompt: list[Message], side: Side, rendered: Rendered, options: Any) -> str:
        """Return an answer as the chat template renders it after the prompt, without the text that ends it."""
        answer = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        messages = [answer] if isinstance(answer, dict) else answer
        template = str(self.chat_template)
        chat = [*prompt, *messages]
        whole = render(self.tokenizer, chat, template, **options)
        for index, each in enumerate(chat):
            for name in set(CONTENT_ALTERNATIVES) & set(each):
                without = [*chat[:index], {**each, name: None}, *chat[index + 1 :]]
                if render(self.tokenizer, without, template, **options) == whole:
                    raise Dropped(f"the chat template leaves out {name!r}")
        rest, end = whole.removeprefix(rendered.text), self._after_answer
        if whole.startswith(rendered.text) and end and rest.endswith(end):
            text = rest.removesuffix(end)
        elif len(messages) == 1 and set(messages[0]) == {"role", "content"}:
            # The template begins answers with more text than it renders of them.
            text = messages[0]["content"]
        elif whole.startswith(rendered.text):
            text = rest
        else:
            raise Dropped("the chat template does not continue the prompt with the answer")
        if not text.strip():
            raise Dropped("empty response")
        return text

    @cached_property
    def end_of_chat_answer(self) -> int | None:
        """The token that ends an answer in a chat."""
        return end_of_answer(self.tokenizer, self.chat_template, self.stop_ids)

    @cached_property
    def _after_answer(self) -> str:
        return after_answer(self.tokenizer, str(self.chat_template))
