"""The members of a guided decoder: loading them, checking them, and running their modules fast."""
