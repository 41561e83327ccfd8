"""The command line, the demo and the benchmarks: ``alaya-tiers --help``."""
