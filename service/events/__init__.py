"""What happened to tasks: the outbox, and all ways out of it."""
