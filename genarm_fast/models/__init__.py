"""The members of a guided decoder: code that loads their models, checks them, and runs them fast."""
