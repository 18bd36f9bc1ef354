"""The steps of a task: accepted, submitted, called back, confirmed, ended."""
