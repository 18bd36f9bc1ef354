"""A submission as a program: for the shell, in Python and in JavaScript."""

import json
import pprint
import shlex

from service.strict_json import JSON


def samples(body: JSON, base_url: str, key: str) -> list[tuple[str, str, str]]:
    """Name, title and text of each program. `key`: the idempotency key."""
    url, text = f"{base_url}/v1/images/generations", json.dumps(body, ensure_ascii=False, indent=2)
    curl = (
        f'curl {shlex.quote(url)} \\\n  -H "Authorization: Bearer $DARKROOM_API_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -H 'Idempotency-Key: {key}' \\\n"
        f"  -d {shlex.quote(text)}"
    )
    python = (
        "import os\nimport httpx\n\n"
        f"answer = httpx.post(\n    {url!r},\n    headers={{\n"
        '        "Authorization": f"Bearer {os.environ[\'DARKROOM_API_KEY\']}",\n'
        f'        "Idempotency-Key": "{key}",\n    }},\n'
        f"    json={indented(pprint.pformat(body, sort_dicts=False, width=72), 9)},\n"
        "    timeout=30,\n)\nanswer.raise_for_status()\nprint(answer.json())"
    )
    javascript = (
        f"const answer = await fetch({json.dumps(url)}, {{\n"
        '  method: "POST",\n  headers: {\n'
        "    Authorization: `Bearer ${process.env.DARKROOM_API_KEY}`,\n"
        f'    "Content-Type": "application/json",\n    "Idempotency-Key": "{key}",\n  }},\n'
        f"  body: JSON.stringify({indented(text, 2)}),\n}});\n"
        "console.log(answer.status, await answer.json());"
    )
    return [
        ("curl", "curl", curl),
        ("python", "Python", python),
        ("javascript", "JavaScript", javascript),
    ]


def indented(text: str, by: int) -> str:
    """Every line but the first."""
    return text.replace("\n", "\n" + " " * by)
