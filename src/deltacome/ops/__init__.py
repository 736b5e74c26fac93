"""The arithmetic of running a delta: one folder per operation, with `api` and its implementations."""
