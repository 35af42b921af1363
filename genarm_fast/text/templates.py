"""Turn text and chat messages into token ids, the same way in training and in decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template

from genarm_fast.text import helper
from genarm_fast.text.deadline import run_within_limits
from genarm_fast.text.messages import Message, check_text
from genarm_fast.text.template_kinds import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 1 << 24  # most characters of a rendered chat; the longest contexts hold a quarter of that
# Marks of content parts that a template has printed as they are.
PRINTED_PART_MARKS = ("'type': 'text'", '"type": "text"')
ANCHORS = ("\n", ".", "a", "0")  # texts that a response may follow without merging with them


class Rendered(NamedTuple):
    """A prompt as its tokenizer gets it. special: whether the tokenizer adds its own special tokens, such as BOS."""

    text: str
    special: bool


def rendered_text(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_template: str | None) -> Rendered:
    """Return a text prompt, inside its template "...{prompt}..." if it has one."""
    text = prompt if prompt_template is None else prompt_template.replace("{prompt}", prompt)
    # A template may spell out the beginning-of-sequence token; the tokenizer must not add it twice.
    bos = tokenizer.bos_token
    return Rendered(text, not (bos and text.startswith(bos)))


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str, **options: Any
) -> Rendered:
    """Render chat messages up to where the assistant's answer begins, or continues if the last message begins it.

    options: further arguments of the template, such as `tools`.
    """
    ahead = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    return Rendered(render(tokenizer, messages, chat_template, **{ahead: True}, **options), False)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Return the token ids of a text. special: whether to include the special tokens that the tokenizer adds.

    Raises:
        ValueError: a text that the tokenizer fails on, for example because a pattern would take forever.
    """
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    # The Rust code of tokenizers panics with an exception that is no subclass of Exception.
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{len(text)} characters: expected a text that the tokenizer can read: {error}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Rendered) -> list[int]:
    """Return the token ids of a prompt. An EOS that the tokenizer would append is left out: the response follows."""
    ids = encoded(tokenizer, prompt.text, special=prompt.special)
    eos = tokenizer.eos_token
    if prompt.special and eos and ids[-1:] == [tokenizer.eos_token_id] and not prompt.text.endswith(eos):
        ids.pop()
    return ids


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Rendered | None, prompt_ids: Sequence[int], response: str
) -> list[int]:
    """Return the token ids of a response after its prompt, cut from the ids of the joined text.

    The joined text is used only if its ids begin with the prompt's own. SentencePiece puts a space before every text,
    so " great" alone would have two spaces. prompt: None if only the prompt's ids are known.
    """
    if prompt is not None:
        joined = token_ids(tokenizer, Rendered(prompt.text + response, prompt.special))
        if joined[: len(prompt_ids)] == list(prompt_ids):
            return joined[len(prompt_ids) :]
    for anchor in ANCHORS:
        before, joined = (encoded(tokenizer, t) for t in (anchor, anchor + response))
        if joined[: len(before)] == before:
            return joined[len(before) :]
    return encoded(tokenizer, response)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's chat template. Of several (for tools, for retrieval), return the one named "default"."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def end_of_answer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, stop_ids: Collection[int] = ()
) -> int | None:
    """Return the token that ends a response.

    It is the stop or special token that the chat template puts after an answer, else EOS. Llama 3 has different ones.
    chat_template: None if the prompt is no chat.
    """
    if chat_template is not None and (after := after_answer(tokenizer, chat_template)):
        ids = encoded(tokenizer, after)
        if ids and (ids[0] in stop_ids or ids[0] in special_tokens(tokenizer)):
            return ids[0]
    return tokenizer.eos_token_id


def after_answer(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    """Return what a chat template puts after the text of an answer; "" if it can't render a plain answer."""
    answer = "ANSWER"
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
    try:
        _, shown, after = render(tokenizer, messages, chat_template).rpartition(answer)
    except ValueError:
        return ""
    return after if shown else ""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that decoding leaves out of a text, by id."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def ended(response: list[int], end: int | None) -> list[int]:
    """Return a whole response with the token that ends it, which is there once even if the text spells it out."""
    return response if end is None or response[-1:] == [end] else [*response, end]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str, **options: Any) -> str:
    """Render messages by a chat template. A template is other people's program, and may fail in any way.

    A template whose operations are all short runs here, under a watch. Any other template runs in a process of its own.

    Raises:
        ValueError: naming what the template raised, or which limit on time, memory or size it met.
    """
    template = chat_template
    try:
        if isinstance(tokenizer.chat_template, dict):
            template = tokenizer.get_chat_template(chat_template, options.get("tools"))
        text = _rendered_with_user_texts(tokenizer, messages, template, options)
    except (RecursionError, ArithmeticError, LookupError, AttributeError, TypeError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # The error is one of Jinja's: the template is faulty, or it refuses these roles.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(_too_long(len(text)))
    return check_text("it makes a text", text)


def _rendered_with_user_texts(
    tokenizer: Any, messages: Sequence[Message], template: str, options: dict[str, Any]
) -> str:
    """Render messages with plain texts as contents, or with lists of parts if only those show every user text."""
    user_texts = [str(message["content"] or "").strip() for message in messages if message["role"] == "user"]
    failed = None
    try:
        text = _rendered(tokenizer, messages, template, options)
        if all(each in text for each in user_texts):
            return text
    # The template raises, for example, if it does not show a last message that has to be continued.
    except ValueError as error:
        if "continue_final_message" not in options:
            raise
        text, failed = "", error
    with suppress(Exception):  # the template wants texts, and changes them
        in_parts = _rendered(tokenizer, [_in_parts(message) for message in messages], template, options)
        printed = any(mark in in_parts and mark not in text for mark in PRINTED_PART_MARKS)
        if all(each in in_parts for each in user_texts) and not printed:
            return in_parts
    if failed is not None:
        raise failed
    return text


def _in_parts(message: Message) -> Message:
    text = message["content"]
    return {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message


def _rendered(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    if is_plain(template):
        return run_within_limits(lambda: _rendered_here(tokenizer, messages, template, options))
    return _rendered_apart(tokenizer, messages, template, options)


def _rendered_here(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    _compile_jinja_template(template).environment.concat = _concatenated
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


def _concatenated(pieces: Iterable[str]) -> str:
    """Join pieces up to a maximal length. With "".join, 100,000 times a long message would be one operation."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise ValueError(_too_long(f"more than {MOST_CHARACTERS}"))
    return "".join(kept)


def _rendered_apart(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    given = {"conversations": [messages], "chat_template": template, **tokenizer.special_tokens_map, **options}
    reply = helper.shared_helper.render(MOST_CHARACTERS, given)
    if "error" in reply:
        kind = "" if reply["error"] in ("TemplateError", "ValueError") else f"{reply['error']}: "
        raise ValueError(f"{kind}{reply['message']}")
    if "characters" in reply:
        raise ValueError(_too_long(reply["characters"]))
    return reply["text"]


def _too_long(characters: int | str) -> str:
    return f"it makes {characters} characters: expected at most {MOST_CHARACTERS}"
