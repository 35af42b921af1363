"""Text and chat messages as token ids, the same in training and in decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template

from genarm_fast.text import helper
from genarm_fast.text.deadline import within
from genarm_fast.text.messages import Message, check_text
from genarm_fast.text.template_kinds import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 1 << 24  # of a rendered chat; the longest contexts hold a quarter of that
PRINTED = ("'type': 'text'", '"type": "text"')  # content parts in a text that a template has put together
ANCHORS = ("\n", ".", "a", "0")  # texts that a response may follow without joining them


class Rendered(NamedTuple):
    """A prompt as its tokenizer gets it. special: whether the tokenizer adds its own special tokens, such as BOS."""

    text: str
    special: bool


def rendered_text(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_template: str | None) -> Rendered:
    """A text prompt, inside its template "...{prompt}..." if it has one."""
    text = prompt if prompt_template is None else prompt_template.replace("{prompt}", prompt)
    # A template may spell out the beginning-of-sequence token; the tokenizer must not add it twice.
    bos = tokenizer.bos_token
    return Rendered(text, not (bos and text.startswith(bos)))


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str, **options: Any
) -> Rendered:
    """Chat messages up to where the assistant's answer begins, or goes on if the last message begins it.

    options: what else the template takes, such as `tools`.
    """
    ahead = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    return Rendered(render(tokenizer, messages, chat_template, **{ahead: True}, **options), False)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text; special: with what the tokenizer adds.

    Raises:
        ValueError: the tokenizer gives up, as over a pattern that would take for ever.
    """
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except BaseException as error:  # the Rust of tokenizers panics with an exception of its own that is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{len(text)} characters: expected a text that the tokenizer can read: {error}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Rendered) -> list[int]:
    """Token ids of a prompt. An EOS that the tokenizer would put behind it is left out: the response follows."""
    ids = encoded(tokenizer, prompt.text, special=prompt.special)
    eos = tokenizer.eos_token
    if prompt.special and eos and ids[-1:] == [tokenizer.eos_token_id] and not prompt.text.endswith(eos):
        ids.pop()
    return ids


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Rendered | None, prompt_ids: Sequence[int], response: str
) -> list[int]:
    """Token ids of a response behind its prompt: those of the joined text, where that begins with the prompt's own.

    SentencePiece puts a space before every text, and so would take " great" by itself for two of them. prompt: None
    where only its ids are known.
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
    """Its chat template; the one called so where it has several (for tools, for retrieval)."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def end_of_answer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, stop_ids: Collection[int] = ()
) -> int | None:
    """The token that ends a response: the stop or special token that the chat template puts after an answer, else EOS.

    They differ for Llama 3, say. `chat_template` None: not a chat.
    """
    if chat_template is not None and (after := after_answer(tokenizer, chat_template)):
        ids = encoded(tokenizer, after)
        if ids and (ids[0] in stop_ids or ids[0] in special_tokens(tokenizer)):
            return ids[0]
    return tokenizer.eos_token_id


def after_answer(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    """What a chat template puts behind the text of an answer; "" where it can't render a plain one."""
    answer = "ANSWER"
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
    try:
        _, shown, after = render(tokenizer, messages, chat_template).rpartition(answer)
    except ValueError:
        return ""
    return after if shown else ""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that decoding leaves out of a text, by id."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def ended(response: list[int], end: int | None) -> list[int]:
    """A whole response with the token that ends it, once also where its text spells that token out."""
    return response if end is None or response[-1:] == [end] else [*response, end]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str, **options: Any) -> str:
    """What a chat template makes of messages. A template is a program of others, and may fail in any way.

    One whose operations are all short runs here, under a watch; any other in a process of its own.

    Raises:
        ValueError: naming what the template raised, or which limit on time, memory or size it met.
    """
    template = chat_template
    try:
        if isinstance(tokenizer.chat_template, dict):
            template = tokenizer.get_chat_template(chat_template, options.get("tools"))
        text = _shown(tokenizer, messages, template, options)
    except (RecursionError, ArithmeticError, LookupError, AttributeError, TypeError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # of Jinja: wrong itself, or it refuses these roles
        raise ValueError(str(error) or type(error).__name__) from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(_too_long(len(text)))
    return check_text("it makes a text", text)


def _shown(tokenizer: Any, messages: Sequence[Message], template: str, options: dict[str, Any]) -> str:
    """What a template makes of contents that are texts, or of parts where it reads these alone and loses texts."""
    said = [str(message["content"] or "").strip() for message in messages if message["role"] == "user"]
    failed = None
    try:
        text = _rendered(tokenizer, messages, template, options)
        if all(each in text for each in said):
            return text
    except ValueError as error:  # of a last message, say, that it does not show
        if "continue_final_message" not in options:
            raise
        text, failed = "", error
    with suppress(Exception):  # it wants texts, and changes them
        in_parts = _rendered(tokenizer, [_in_parts(message) for message in messages], template, options)
        printed = any(mark in in_parts and mark not in text for mark in PRINTED)
        if all(each in in_parts for each in said) and not printed:
            return in_parts
    if failed is not None:
        raise failed
    return text


def _in_parts(message: Message) -> Message:
    text = message["content"]
    return {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message


def _rendered(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    if is_plain(template):
        return within(lambda: _rendered_here(tokenizer, messages, template, options))
    return _rendered_apart(tokenizer, messages, template, options)


def _rendered_here(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    _compile_jinja_template(template).environment.concat = _concatenated
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


def _concatenated(pieces: Iterable[str]) -> str:
    """As "".join, up to a length: a hundred thousand times a long message is one operation otherwise."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise ValueError(_too_long(f"more than {MOST_CHARACTERS}"))
    return "".join(kept)


def _rendered_apart(tokenizer: Any, messages: Any, template: str, options: dict[str, Any]) -> str:
    given = {"conversations": [messages], "chat_template": template, **tokenizer.special_tokens_map, **options}
    reply = helper.shared.render(MOST_CHARACTERS, given)
    if "error" in reply:
        kind = "" if reply["error"] in ("TemplateError", "ValueError") else f"{reply['error']}: "
        raise ValueError(f"{kind}{reply['message']}")
    if "characters" in reply:
        raise ValueError(_too_long(reply["characters"]))
    return reply["text"]


def _too_long(characters: int | str) -> str:
    return f"it makes {characters} characters: expected at most {MOST_CHARACTERS}"
