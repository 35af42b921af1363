"""Measure what guidance costs on the user's own machine and models, with contenders that take turns."""
