"""Relatives of the method over the same engine, each a short script that trains."""
