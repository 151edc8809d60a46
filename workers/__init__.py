"""One replica: an engine and what keeps it."""
