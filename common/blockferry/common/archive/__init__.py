"""Archives of volumes in object storage; docs/archive-format.md has every byte."""
