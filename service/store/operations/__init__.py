"""The write operations, one file a step: `operation(tx, items) -> results`, one result an item, in
the items' order.

Whoever changes a task locks its row first, in the order of ids; the outbox's counter is locked
last.
"""
