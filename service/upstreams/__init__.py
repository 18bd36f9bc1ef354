"""The image APIs behind the service."""
