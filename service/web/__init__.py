"""The service over HTTP. `routes` has the whole table."""
