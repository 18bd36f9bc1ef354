"""The Grafana dashboard of deploy/grafana, made from a table of panels."""

import json
from typing import Any

JOB = '{job=~"darkroom.*"}'

# Row, then panels with a title, a unit and their queries by legend. `$j` selects the job.
PANELS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "Tasks": [
        ("Tasks by state", "short", {"{{state}}": "max by (state) (darkroom_tasks$j)"}),
        (
            "Oldest task that has not ended",
            "s",
            {"age": "max(darkroom_oldest_unsettled_seconds$j)"},
        ),
        ("Rows that wait", "short", {"{{stage}}": "max by (stage) (darkroom_queue_depth$j)"}),
        (
            "Time left of the first unsaved link",
            "s",
            {"left": "min(darkroom_result_seconds_left$j)"},
        ),
    ],
    "Callbacks": [
        (
            "Callbacks by verdict",
            "cps",
            {"{{verdict}}": "sum by (verdict) (rate(darkroom_callbacks_total$j[5m]))"},
        ),
        (
            "Commit of a callback",
            "s",
            {
                f"p{share}": f"histogram_quantile(0.{share}, sum by (le) "
                "(rate(darkroom_callback_commit_seconds_bucket$j[5m])))"
                for share in (50, 99)
            },
        ),
        (
            "Callback to event, callback to delivery (p99)",
            "s",
            {
                way: f"histogram_quantile(0.99, sum by (le) "
                f"(rate(darkroom_callback_to_{way}_seconds_bucket$j[5m])))"
                for way in ("event", "delivery")
            },
        ),
        (
            "Requests answered with 503",
            "cps",
            {
                "overload": "sum(rate(darkroom_requests_shed_total$j[5m]))",
                "store": "sum(rate(darkroom_store_failures_total$j[5m]))",
            },
        ),
    ],
    "Upstream and images": [
        (
            "Calls by kind and outcome",
            "cps",
            {
                "{{kind}} {{outcome}}": "sum by (kind, outcome) "
                "(rate(darkroom_upstream_requests_total$j[5m]))"
            },
        ),
        ("Credits left", "short", {"credits": "min(darkroom_upstream_credits$j)"}),
        ("Credits of all tasks", "short", {"{{kind}}": "max by (kind) (darkroom_credits_total$j)"}),
        (
            "Downloads",
            "cps",
            {"{{outcome}}": "sum by (outcome) (rate(darkroom_downloads_total$j[5m]))"},
        ),
        ("Free space for images", "bytes", {"free": "min(darkroom_blob_free_bytes$j)"}),
    ],
    "Events": [
        (
            "Deliveries by outcome",
            "cps",
            {"{{outcome}}": "sum by (outcome) (rate(darkroom_deliveries_total$j[5m]))"},
        ),
        ("Dead deliveries", "short", {"dead": "max(darkroom_dead_letters$j)"}),
        ("Oldest due delivery", "s", {"age": "max(darkroom_oldest_due_delivery_seconds$j)"}),
        ("Brokers behind", "s", {"{{sink}}": "max by (sink) (darkroom_sink_lag$j)"}),
    ],
    "Processes": [
        ("Processes by role", "short", {"{{role}}": "max by (role) (darkroom_processes$j)"}),
        (
            "Unforeseen exceptions",
            "cps",
            {"{{stage}}": "sum by (stage) (rate(darkroom_worker_faults_total$j[5m]))"},
        ),
        (
            "Account refused, submission paused",
            "short",
            {
                "refused": "max(darkroom_account_refused$j)",
                "paused": "max(darkroom_submission_paused$j)",
            },
        ),
    ],
}


def dashboard() -> str:
    """The dashboard as JSON, for Grafana's import."""
    panels: list[dict[str, Any]] = []
    for row, (title, drawn) in enumerate(PANELS.items()):
        top = row * 9
        grid = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": grid})
        width = 24 // len(drawn)
        for column, (name, unit, queries) in enumerate(drawn):
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "timeseries",
                    "title": name,
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "gridPos": {"h": 8, "w": width, "x": column * width, "y": top + 1},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "targets": [
                        {
                            "refId": chr(65 + n),
                            "expr": expr.replace("$j", JOB),
                            "legendFormat": legend,
                        }
                        for n, (legend, expr) in enumerate(queries.items())
                    ],
                }
            )
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"}
    board = {
        "title": "Darkroom",
        "uid": "darkroom",
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source]},
        "panels": panels,
    }
    return json.dumps(board, indent=1) + "\n"
