"""Text and chat messages as token ids, the same in training and in decoding."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_template: str | None) -> list[int]:
    """A text prompt, inside its template "...{prompt}..." if it has one."""
    text = prompt if prompt_template is None else prompt_template.replace("{prompt}", prompt)
    # A template may spell out the beginning-of-sequence token; the tokenizer must not add it twice.
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Its chat template; the one called so where it has several (for tools, for retrieval)."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], chat_template: str) -> list[int]:
    """Chat messages up to the point where the assistant's answer begins."""
    text = _render(tokenizer, messages, chat_template, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_answer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, stop_ids: Collection[int]
) -> int | None:
    """The token that ends a response: the stop token that the chat template puts after an answer, else the EOS.

    They differ for Llama 3, say. `chat_template` None: not a chat.
    """
    if chat_template is not None:
        answer = "ANSWER"
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
        after = _render(tokenizer, messages, chat_template).rpartition(answer)[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in stop_ids:
            return ids[0]
    return tokenizer.eos_token_id


def ended(response: list[int], end: int | None) -> list[int]:
    """A whole response with the token that ends it, once also where its text spells that token out."""
    return response if end is None or response[-1:] == [end] else [*response, end]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any, chat_template: str, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options))
