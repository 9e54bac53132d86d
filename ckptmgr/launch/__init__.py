"""How a process was started, recorded without secrets, and how to start it again."""
