"""Tokens coloured by what an ARM thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from genarm_fast.text.detokenize import Detokenizer

END = "∎"  # stands for the end-of-sequence token: it has no text, but the ARM has an opinion of it as well
# Blue where the ARM favours a token, orange where it does not (colour-blind readers tell them apart), in dark ink that
# reads on any background. A shade begins at each of these absolute advantages, in nats.
SHADES = (0.25, 1.0, 2.0, 4.0)
FAVOURED = ("#dcebf7", "#a9cfec", "#6fadde", "#3b8bc9")
DISFAVOURED = ("#fbe6d0", "#f8c48c", "#f09a4a", "#dd7414")


def style(advantage: float) -> str:
    """The rich style of a token of this advantage over the base: log π_arm - log π_base, in nats."""
    shade = sum(abs(advantage) >= start for start in SHADES)
    return f"#101010 on {(FAVOURED if advantage > 0 else DISFAVOURED)[shade - 1]}" if shade else ""


def tint(pieces: Sequence[str], advantages: Sequence[float]) -> Text:
    """The text that the pieces spell, each in the colour of its advantage."""
    text = Text.assemble(*((piece, style(advantage)) for piece, advantage in zip(pieces, advantages)))
    text.rstrip()
    return text


def legend(arm: str) -> Text:
    """What the colours mean."""
    values = [-start for start in reversed(SHADES)] + list(SHADES)
    scale = Text().join(Text(f" {value:+g} ", style(value)) for value in values)
    return Text.assemble(f"log π_{arm} - log π_base, nats ", scale, f"  {END} end", style="dim")


def extremes(pieces: Sequence[str], advantages: Sequence[float], count: int = 3) -> str:
    """The most favoured and the least favoured tokens in words, for where there is no colour."""
    ranked = sorted(zip(advantages, pieces))
    low = [pair for pair in ranked[:count] if pair[0] <= -SHADES[0]]
    high = [pair for pair in reversed(ranked[-count:]) if pair[0] >= SHADES[0]]
    return ", ".join(f"{piece.strip() or repr(piece)} {advantage:+.1f}" for advantage, piece in high + low)


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: "" inside an unfinished character, END for a special token."""
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    return [END if token_id in special else piece for token_id, piece in zip(token_ids, pieces)]
