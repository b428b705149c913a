"""The source site: plans, syncs, and the command line."""
