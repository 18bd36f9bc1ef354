"""The URLs of the service, and what answers each."""
