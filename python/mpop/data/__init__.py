"""Data sets as texts and labels."""
