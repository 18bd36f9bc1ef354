"""Darkroom: between applications and asynchronous image APIs."""

VERSION = "0.1.0"  # the package's too: pyproject.toml reads it here
