"""A run's test period, served again in the order of time."""
