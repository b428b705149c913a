"""The archive: snapshots in object storage. Formats are pure; `store.py` is the only way to objects."""
