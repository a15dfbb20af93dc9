"""Soak test of server and training: `python -m tests.soak`."""
