"""One run directory: what it holds, which of it counts, how a checkpoint comes to exist, and how it goes."""
