"""The artifact: what is on disk and what it means, and the Hub that it may come from."""
