"""What profiles gain and cost: summaries over seeds, and benchmarks against their floors."""
