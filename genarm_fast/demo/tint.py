"""Tokens coloured by an ARM's advantage of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from genarm_fast.text.detokenize import Detokenizer

# Stands for the end-of-sequence token, which has no text but does have an advantage.
END = "∎"
# Blue marks a token that the ARM favours, orange one that it disfavours (colour-blind readers can tell them apart). The
# ink is dark and readable on any background. A shade begins at each of these absolute advantages, in nats.
SHADES = (0.25, 1.0, 2.0, 4.0)
FAVOURED = ("#dcebf7", "#a9cfec", "#6fadde", "#3b8bc9")
DISFAVOURED = ("#fbe6d0", "#f8c48c", "#f09a4a", "#dd7414")


def style(advantage: float) -> str:
    """Return the rich style of a token with this advantage over the base: log π_arm - log π_base, in nats."""
    shade = sum(abs(advantage) >= start for start in SHADES)
    return f"#101010 on {(FAVOURED if advantage > 0 else DISFAVOURED)[shade - 1]}" if shade else ""


def tint(pieces: Sequence[str], advantages: Sequence[float]) -> Text:
    """Return the text of the pieces, each in the colour of its advantage."""
    text = Text.assemble(*((piece, style(advantage)) for piece, advantage in zip(pieces, advantages)))
    text.rstrip()
    return text


def legend(arm: str) -> Text:
    """Return a line that explains the colours."""
    values = [-start for start in reversed(SHADES)] + list(SHADES)
    scale = Text().join(Text(f" {value:+g} ", style(value)) for value in values)
    return Text.assemble(f"log π_{arm} - log π_base, nats ", scale, f"  {END} end", style="dim")


def extremes(pieces: Sequence[str], advantages: Sequence[float], count: int = 3) -> str:
    """Return the most favoured and the least favoured tokens as text, for terminals without colour."""
    ranked = sorted(zip(advantages, pieces))
    low = [pair for pair in ranked[:count] if pair[0] <= -SHADES[0]]
    high = [pair for pair in reversed(ranked[-count:]) if pair[0] >= SHADES[0]]
    return ", ".join(f"{piece.strip() or repr(piece)} {advantage:+.1f}" for advantage, piece in high + low)


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text: "" inside an unfinished character, END for a special token."""
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    return [END if token_id in special else piece for token_id, piece in zip(token_ids, pieces)]
