"""What the benchmarks share: the machine's limits, measuring in turns, peers, shapes and works."""
