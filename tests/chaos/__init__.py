"""Fault injection: `python -m tests.chaos` kills processes, fills disks and damages files, and checks that nothing is lost."""
