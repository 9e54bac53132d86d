"""From a run to files that other tools read, and from their files to a run."""
