"""The artifact: what is on disk, what it means, and the Hub it may come from."""
