"""Darkroom: between applications and asynchronous image APIs."""

VERSION = "1.0.0"  # the package's too, in pyproject.toml
