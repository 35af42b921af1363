"""Small helpers that do not depend on models: checks of numbers, files, records, progress bars."""
