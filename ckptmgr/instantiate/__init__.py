"""Objects from configuration: what it may name, and how that is found, checked and built."""
