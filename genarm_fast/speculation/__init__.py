"""Speculation: who drafts tokens, and how many, so that steps pay off. Drafts never change a token."""

from genarm_fast.speculation.config import Speculation

__all__ = ["Speculation"]
