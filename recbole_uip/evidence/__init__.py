"""What profiles gain and cost: experiments, statistics, reports, replays and benchmarks."""
