"""Downloads results, validates them and sweeps the blob store."""
