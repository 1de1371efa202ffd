"""One layer beside every other way to compute it: cases, ways, a run, goals, a report."""
