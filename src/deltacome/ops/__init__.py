"""The arithmetic of running a delta, each operation a folder: `api` and its implementations."""
