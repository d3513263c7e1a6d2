"""What bench, eval and draft share: the machine, statistics, plots, texts."""
