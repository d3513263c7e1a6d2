"""Many requests from a file, answered as fast as the engine goes, each once."""
