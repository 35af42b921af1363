"""Speculation: which drafter proposes tokens, and how many, so that decoding is fast. Drafts never change a token."""

from genarm_fast.speculation.config import Speculation

__all__ = ["Speculation"]
