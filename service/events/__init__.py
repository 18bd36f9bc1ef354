"""The events of tasks: the outbox, and all ways out of it."""
