"""The token ids that all members share, and the token ids that end a response."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from genarm_fast.models.member import Member
from genarm_fast.text.templates import end_of_answer


def common_vocabulary(members: Sequence[Member]) -> int:
    """Return the number of token ids that all members share: the smallest size of all logits and tokenizers.

    Raises:
        ValueError: two tokenizers disagree on one of these ids.
    """
    tokenizers = {id(member.tokenizer): member for member in members}
    tokens = {
        key: {i: token for token, i in member.tokenizer.get_vocab().items()} for key, member in tokenizers.items()
    }
    size = min(*(member.vocab_size for member in members), *(max(table) + 1 for table in tokens.values()))
    expected = tokens[id(members[0].tokenizer)]
    for key, member in tokenizers.items():
        if tokens[key] == expected:
            continue
        for i in range(size):
            if tokens[key].get(i) != expected.get(i):
                raise ValueError(
                    f"{member.name}: its tokenizer disagrees with the base's at token id {i} of the {size} in common:"
                    f" got {tokens[key].get(i)!r}, expected {expected.get(i)!r}"
                )
    return size


def end_of_sequence(base: Member, vocab_size: int) -> frozenset[int]:
    """Return the token ids that end a response.

    These are the EOS ids of the base's generation config, else of its config; the EOS of its tokenizer; the token that
    its chat template puts behind an answer; and the tokens that ARMs were trained to end with.
    """
    generation_config = getattr(base.model, "generation_config", None)
    candidates: tuple[int | list[int] | None, ...] = (
        getattr(generation_config, "eos_token_id", None),
        base.model.config.get_text_config().eos_token_id,
    )
    eos = next((value for value in candidates if value is not None), [])
    listed = eos if isinstance(eos, (list, tuple)) else [eos]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        raise ValueError(f"base: eos_token_id={eos!r:.60} of its generation config or config: expected token ids")
    configured = frozenset(listed)
    ends = (base.tokenizer.eos_token_id, end_of_answer(base.tokenizer, base.chat_template, configured))
    ids = configured | base.stop_ids | {end for end in ends if end is not None}
    if not any(0 <= token_id < vocab_size for token_id in ids):
        warnings.warn(f"end-of-sequence ids {sorted(ids)} of the base: expected one below {vocab_size}", stacklevel=2)
    return ids
