"""Fuzzing of every input from outside: `python -m tests.fuzz`."""
