"""The same guided decoding inside other libraries' decoders. Each module imports the library it is named after."""
