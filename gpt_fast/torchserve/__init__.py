"""What surrounds a TorchServe that serves us: the archive it is given, and the checks before it starts (no ts)."""
