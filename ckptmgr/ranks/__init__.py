"""What the ranks of one job tell each other: rank 0 decides, the others receive, every wait has a deadline."""
