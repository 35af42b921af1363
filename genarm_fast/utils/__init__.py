"""Files and progress bars: small helpers that know nothing of models."""
