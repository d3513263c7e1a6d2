"""The model: one forward, its cache, and how it is shared among ranks."""
