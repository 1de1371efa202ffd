"""Data sets as texts and labels, and how long a text may be."""
