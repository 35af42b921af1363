"""The decode loop: it takes requests, and gives their sequences tokens one step at a time."""
