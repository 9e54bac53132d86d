"""Format version 1: key names, records, the tagged tree, digests. FORMAT.md says it all in words."""
