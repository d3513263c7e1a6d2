"""The chat page: its files, as every door serves them, and a relay that brings it to a server with a token."""
