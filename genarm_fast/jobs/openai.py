"""Lines of OpenAI's batch files: `{"custom_id", "method", "url", "body"}` in, responses in that API's form out.

Bodies are those of `/v1/chat/completions` and `/v1/completions`. Fields beyond OpenAI's are those of `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from genarm_fast.outputs import Completion, GenerationOutput, rewards_to_dict
from genarm_fast.params import SamplingParams
from genarm_fast.text.detokenize import token_bytes, token_text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LINE_FIELDS = {"custom_id", "method", "url", "body"}
RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
IGNORED_FIELDS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that would change the answer and are not supported. These values ask for nothing, so they are accepted.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)} - {"logits_processors", "max_time", "priority"}
REASONS = {"time": "length", "cancelled": "stop"}


def is_openai(row: Mapping[str, Any]) -> bool:
    """Whether a line has the form of OpenAI's batch files."""
    return "custom_id" in row or "body" in row


def request_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line in this project's form: id, prompt, sampling parameters.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    if unknown := sorted(set(row) - LINE_FIELDS):
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(sorted(LINE_FIELDS))}, beside custom_id")
    if not isinstance(row.get("custom_id"), str):
        raise ValueError(f"custom_id={row.get('custom_id')!r:.60}: expected a text")
    if row.get("method", "POST") != "POST":
        raise ValueError(f"method={row['method']!r:.60}: expected 'POST'")
    if row.get("url") not in (CHAT, TEXT):
        raise ValueError(f"url={row.get('url')!r:.60}: expected {CHAT!r} or {TEXT!r}")
    body = row.get("body")
    if not isinstance(body, dict):
        raise ValueError(f"body={body!r:.60}: expected an object")
    chat = row["url"] == CHAT
    own = "messages" if chat else "prompt"
    if own not in body:
        raise ValueError(f"body: expected {own!r} in it")
    request: dict[str, Any] = {"id": row["custom_id"], "prompt": body[own]}
    if chat and not isinstance(body[own], list):
        raise ValueError(f"messages={body[own]!r:.60}: expected a list of messages")
    for name, value in body.items():
        if name == own or name in IGNORED_FIELDS or value is None:
            continue
        if name in NEUTRAL_VALUES:
            if value not in NEUTRAL_VALUES[name]:
                raise ValueError(f"{name}={value!r:.60}: expected none, or {NEUTRAL_VALUES[name][0]!r}")
        elif name in ("logprobs", "top_logprobs") and chat:
            continue
        elif name == "chat_template_kwargs" and chat:  # the same field as in vLLM
            request[name] = value
        elif (known := RENAMED.get(name, name)) in SAMPLING_FIELDS:
            if known in request:
                raise ValueError(f"{name}={value!r:.60}: expected one limit, it has two names here")
            request[known] = value
        else:
            names = sorted(
                SAMPLING_FIELDS | set(RENAMED) | IGNORED_FIELDS | set(NEUTRAL_VALUES) | {own, "top_logprobs"}
            )
            raise ValueError(f"{name}={value!r:.60}: expected one of {', '.join(names)}")
    if chat:
        request |= _chat_logprobs(body)
    return request


def _chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted, most = body.get("logprobs") or False, body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise ValueError(f"logprobs={wanted!r:.60}: expected true or false (top_logprobs says how many)")
    if most is not None and not wanted:
        raise ValueError(f"top_logprobs={most!r:.60}: expected logprobs=true with it")
    return {"logprobs": most or 0} if wanted else {}


def head_of(row: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the beginning of the output line. head: the beginning in this project's form."""
    return {**head, "id": f"batch_req_{head['request']}", "custom_id": row["custom_id"]}


def failure_of(message: str) -> dict[str, Any]:
    """Return the fields after the head for a request that failed."""
    return {"response": None, "error": {"code": "generation_error", "message": message}}


def response_of(row: Mapping[str, Any], head: Mapping[str, Any], output: GenerationOutput, tokenizer: Any) -> Any:
    """Return the fields after the head for an answered request. With `created` 0, equal jobs write equal bytes."""
    chat = row["url"] == CHAT
    usage = output.usage
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{head['request']}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": row["body"].get("model"),
        "choices": [_choice(chat, i, each, tokenizer) for i, each in enumerate(output.completions)],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }
    return {"response": {"status_code": 200, "request_id": body["id"], "body": body}, "error": None}


def _choice(chat: bool, index: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if chat:
        choice["message"] = {"role": "assistant", "content": completion.text}
        choice["logprobs"] = _logprobs_of_chat(completion, tokenizer)
    else:
        choice["text"] = completion.text
        choice["logprobs"] = _logprobs_of_text(completion, tokenizer)
    choice["finish_reason"] = REASONS.get(completion.finish_reason, completion.finish_reason)
    if completion.rewards is not None:
        choice["rewards"] = rewards_to_dict(completion.rewards)
    return choice


def _logprobs_of_chat(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        known = token_bytes(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if known is None else list(known)}

    return {
        "content": [
            {**entry(token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top.items()]}
            for token, each in zip(completion.token_ids, completion.logprobs)
        ]
    }


def _logprobs_of_text(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens = [token_text(tokenizer, token) for token in completion.token_ids]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [{token_text(tokenizer, t): value for t, value in each.top.items()} for each in completion.logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in completion.logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }
