"""Examples: scripts to start, and the models and data that the files in `configs/` name."""
