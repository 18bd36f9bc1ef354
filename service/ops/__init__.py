"""The operators' view: log lines, metrics, traces. A leaf: any layer may use it, it uses none."""
