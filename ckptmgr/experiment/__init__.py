"""Experiments from configuration: what a configuration may say, what it would build, and running it."""
