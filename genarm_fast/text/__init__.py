"""Turn prompts into token ids and tokens into text, the same way in training and in decoding."""
