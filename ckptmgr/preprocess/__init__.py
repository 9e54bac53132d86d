"""What turns raw input into what the model takes: its state, its fingerprint, and the first place where two differ."""
