"""What is this, and why does it not load: files recognised, differences explained, drift graded."""
