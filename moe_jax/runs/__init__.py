"""A run and its directory: training, resuming, loading, reports."""
