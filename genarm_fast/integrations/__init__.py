"""Guided decoding inside other libraries' decoders. Each module imports the library that it is named after."""
