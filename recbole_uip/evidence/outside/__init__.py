"""Another library on the rows and profiles of a run."""
