"""Configurations: read, compose, override, compare and store them. Nothing here builds an object or imports torch."""
