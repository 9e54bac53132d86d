"""The ranks of a job as PyTorch has started them, and sharded state through PyTorch's own planners."""
