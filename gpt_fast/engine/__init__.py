"""Who runs when: the scheduler, the runners of a step, and the core that joins them."""
