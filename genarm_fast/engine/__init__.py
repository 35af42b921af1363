"""The decode loop: requests in, tokens out, one step at a time."""
