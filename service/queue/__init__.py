"""Leases on rows, the workers that hold them, and when to try again. Knows no step."""
