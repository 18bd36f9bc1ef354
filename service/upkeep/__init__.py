"""Housekeeping: retention, new encryption keys, restored stores, figures."""
