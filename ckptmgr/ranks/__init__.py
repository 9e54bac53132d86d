"""What the ranks of one job tell each other: rank 0 decides, the others receive, and nobody waits without a deadline."""
