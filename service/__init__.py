"""Darkroom: between applications and asynchronous image APIs."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("darkroom-service")
except PackageNotFoundError:  # a checkout that was never installed
    VERSION = "0+unknown"
