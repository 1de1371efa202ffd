"""The benchmark: one registry of cases, every way to compute them, one run, one report."""
