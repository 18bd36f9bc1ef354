"""The steps of a task, one file each, in the order of the data."""
