"""Experiments: what is asked, what was run, and what came out."""
