"""Drafts: who proposes tokens, and how many, so that steps pay off. Drafts never change a token."""
