"""Prompts into token ids and tokens into text, the same in training and in decoding."""
