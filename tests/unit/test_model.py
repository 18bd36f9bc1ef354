"""The model of the product: states and their moves, ids, times, credits, documents and type
patterns.
"""

from decimal import Decimal

import pytest

from service.credits import MAX_CREDITS, credits_number, credits_text, millionths
from service.db.tables import images, tasks
from service.events.documents import event_document, type_matches
from service.ids import BLOB, EXTENSIONS, PREFIXES, blob_name, make_id, rfc3339, sequence_text
from service.links import Links, with_links
from service.tasks.document import task_document
from service.tasks.rows import IMAGE_COLUMNS, TASK_COLUMNS, ImageRow, TaskRow
from service.tasks.state import TERMINAL, State, may_become, status_of
from service.upstreams.base import FINAL, Report, Status, outcome_digest

BASE = "https://d.test"


def image(id: str, index: int, blob: str, media_type: str, *figures: int, sha256: str) -> ImageRow:
    size, width, height = figures
    return ImageRow(
        id,
        "task_1",
        "painter",
        index,
        "stored",
        True,
        "",
        0,
        blob,
        media_type,
        size,
        sha256,
        width,
        height,
    )


IMAGE = image("img_1", 0, "task_1/0-ab.png", "image/png", 1954330, 1280, 1024, sha256="ab")
TABLE = {
    "queued": "submitting failed cancelled",
    "submitting": "submitted queued uncertain failed cancelled",
    "uncertain": "submitted failed cancelled submitting",
    "submitted": "storing failed cancelled expired",
    "storing": "completed failed cancelled",
    "completed": "",
    "failed": "",
    "cancelled": "",
    "expired": "",
}


def task(state: State = State.SUBMITTED, **different: object) -> TaskRow:
    usual: dict[str, object] = {
        "id": "task_1",
        "owner": "painter",
        "created_at": 1757165031999,
        "model": "wan2.5-text-to-image",
    }
    # each test sets a few fields
    return TaskRow(state=state, upstream="evolink", **(usual | different))  # type: ignore[arg-type]


def test_the_rows_have_an_attribute_for_every_column() -> None:
    """A column that a migration adds must be in the record too. The body is read by submissions
    alone.
    """
    assert {column.name for column in TASK_COLUMNS} == {*tasks.c.keys()} - {"body"}
    assert {column.name for column in IMAGE_COLUMNS} == set(images.c.keys())


def test_every_move_is_in_the_table_of_states() -> None:
    """The table of docs/concepts.md decides all 81 pairs of states."""
    assert {
        before.value: {after.value for after in State if may_become(before, after)}
        for before in State
    } == {before: set(after.split()) for before, after in TABLE.items()}


def test_a_terminal_state_has_no_moves() -> None:
    """Every other state has one, and a task knows whether it is terminal."""
    assert {
        state for state in State if not any(may_become(state, after) for after in State)
    } == TERMINAL
    assert [task(state).terminal for state in State] == [state in TERMINAL for state in State]


@pytest.mark.parametrize("state", State)
def test_the_upstreams_clients_see_its_own_statuses(state: State) -> None:
    """Each state maps to a status of the upstream. Only `submitted` shows the upstream's last
    status.
    """
    shown = {status_of(state, status) for status in (None, *Status)}
    assert (
        shown
        == {
            "queued": {"pending"},
            "submitting": {"pending"},
            "uncertain": {"pending"},
            "submitted": {"pending", "processing"},
            "storing": {"processing"},
            "completed": {"completed"},
            "failed": {"failed"},
            "cancelled": {"failed"},
            "expired": {"failed"},
        }[state]
    )
    assert status_of(State.SUBMITTED, Status.PROCESSING) is Status.PROCESSING


def test_an_id_is_a_prefix_and_26_characters() -> None:
    """They are lower-case base32: 48 bits of time, so that ids sort by it, and 80 random bits."""
    ids = [make_id("task", now, b"\x00" * 10) for now in (0, 1, 2**20, 2**47)]
    assert ids[0] == "task_" + "a" * 26
    assert make_id("image", 2**48 - 1, b"\xff" * 10) == "img_" + "7" * 25 + "4"
    assert make_id("event", 2**48 + 1, b"\x00" * 10) == make_id("event", 1, b"\x00" * 10)
    assert all(len(made) == 31 for made in ids)


@pytest.mark.parametrize("random", [b"", bytes(9), bytes(11)])
def test_an_id_needs_80_random_bits(random: bytes) -> None:
    """An id with fewer bits could be guessed."""
    with pytest.raises(ValueError, match="10 random bytes"):
        make_id("task", 0, random)


def test_every_kind_of_id_has_a_prefix_of_its_own() -> None:
    assert len(set(PREFIXES.values())) == len(PREFIXES)
    assert all(prefix.endswith("_") for prefix in PREFIXES.values())


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (1757165031999, "2025-09-06T13:23:51.999Z"),
        (1769903999123, "2026-01-31T23:59:59.123Z"),
    ],
)
def test_times_are_rfc_3339_with_milliseconds(ms: int, text: str) -> None:
    """They are in UTC, always with three decimals of a second."""
    assert rfc3339(ms) == text


def test_a_sequence_is_twenty_digits() -> None:
    """Text order is number order, up to the largest number that a store can hold."""
    assert sequence_text(42) == "00000000000000000042"
    assert sequence_text(2**63 - 1) == "09223372036854775807"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1_000_000),
        (0, 0),
        (8.7, 8_700_000),
        (0.05, 50_000),
        ("1.5", 1_500_000),
        (Decimal("0.0000005"), 0),
        (Decimal("0.0000015"), 2),
        (MAX_CREDITS, MAX_CREDITS * 1_000_000),
        (MAX_CREDITS + 1, None),
        (-0.1, None),
        (float("nan"), None),
        (float("inf"), None),
        ("1e400", None),
        ("twelve", None),
        ("", None),
        (None, None),
        (True, None),
        ([1], None),
    ],
)
def test_credits_are_millionths(value: object, expected: int | None) -> None:
    """Every form that the upstream uses is read. A malformed number is unknown, never an error."""
    assert millionths(value) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, None), (0, 0), (1_000_000, 1), (8_700_000, 8.7), (50_000, 0.05), (1, 0.000001)],
)
def test_credits_are_shown_as_the_upstream_writes_them(
    value: int | None, shown: float | None
) -> None:
    """Whole numbers are integers, and other numbers are decimals."""
    assert credits_number(value) == shown
    assert type(credits_number(value)) is type(shown)


def test_a_report_is_final_by_its_status() -> None:
    """An undocumented status is not final."""
    assert {status for status in (None, *Status) if Report(status=status).final} == FINAL


def test_outcomes_are_equal_by_status_and_ordered_results() -> None:
    """A foreign id makes another outcome."""
    same = outcome_digest(Status.COMPLETED, ["a", "b"])
    assert same == outcome_digest(Status.COMPLETED, ("a", "b"))
    others = [
        outcome_digest(Status.COMPLETED, ["b", "a"]),
        outcome_digest(Status.COMPLETED, ["ab"]),
        outcome_digest(Status.FAILED, ["a", "b"]),
        outcome_digest(None, ["a", "b"]),
        outcome_digest(Status.COMPLETED, ["a", "b"], "task-unified-1"),
    ]
    assert len({same, *others}) == 6


def test_a_new_tasks_document_has_every_key() -> None:
    """Unknown values are null. `created` is in Unix seconds, as at the upstream."""
    assert task_document(task(State.QUEUED)) == {
        "id": "task_1",
        "owner": "painter",
        "object": "image.generation.task",
        "created": 1757165031,
        "ended_at": None,
        "erased_at": None,
        "model": "wan2.5-text-to-image",
        "type": "image",
        "status": "pending",
        "progress": 0,
        "task_info": {"can_cancel": True, "estimated_time": None},
        "usage": {
            "billing_rule": None,
            "credits_reserved": None,
            "credits_used": None,
            "user_group": None,
        },
        "results": [],
        "error": None,
        "state": "queued",
        "upstream": "evolink",
        "upstream_id": None,
        "metadata": {},
        "request": {},
        "warnings": [],
        "inputs": [],
        "images": [],
    }


def test_a_completed_tasks_document_has_its_images_and_no_prompt() -> None:
    """Progress is 100, and the task cannot be cancelled. The document has no links, because they
    follow the service's address.
    """
    document = task_document(
        task(
            State.COMPLETED,
            upstream_id="task-unified-1",
            progress=80,
            estimated_time=45,
            credits_reserved=2_000_000,
            credits_used=1_500_000,
            billing_rule="per_call",
            user_group="default",
            metadata={"order": "7"},
            request={"n": 1},
            prompt="a secret lighthouse",
        ),
        [IMAGE],
    )
    assert (document["progress"], document["task_info"]) == (
        100,
        {"can_cancel": False, "estimated_time": 45},
    )
    assert document["usage"] == {
        "billing_rule": "per_call",
        "credits_reserved": 2,
        "credits_used": 1.5,
        "user_group": "default",
    }
    shown = {
        "id": "img_1",
        "index": 0,
        "url": None,
        "media_type": "image/png",
        "bytes": 1954330,
        "sha256": "ab",
        "width": 1280,
        "height": 1024,
    }
    assert document["images"] == [shown]
    assert "lighthouse" not in str(document)


def test_links_are_added_for_a_reader() -> None:
    """Every image gets a link. `results` are the links of a completed task, in order. The stored
    document stays as it is.
    """
    second = image("img_2", 1, "task_1/1-cd.png", "image/png", 1, 1, 1, sha256="cd")
    for state, results in [
        (State.COMPLETED, [f"{BASE}/images/img_1.png", f"{BASE}/images/img_2.png"]),
        (State.FAILED, []),
    ]:
        kept = task_document(task(state), [IMAGE, second])
        shown = with_links(kept, Links(BASE))
        assert shown["results"] == results
        assert [image["url"] for image in shown["images"]] == [
            f"{BASE}/images/img_1.png",
            f"{BASE}/images/img_2.png",
        ]
        assert [image["url"] for image in kept["images"]] == [None, None]
        assert {**shown, "results": [], "images": []} == {**kept, "images": []}


def test_links_to_images_may_lead_to_another_server() -> None:
    """That server has the blobs under their names, which the stored document contains."""
    links = Links(BASE, "https://cdn.test/i")
    for number, (media_type, extension) in enumerate(EXTENSIONS.items()):
        blob = blob_name("task_1", number, "ab", media_type)
        stored = image("img_1", number, blob, media_type, 1, 1, 1, sha256="ab")
        (link,) = with_links(task_document(task(State.COMPLETED), [stored]), links)["results"]
        assert (
            link
            == f"https://cdn.test/i/{stored.blob}"
            == f"https://cdn.test/i/task_1/{number}-ab.{extension}"
        )
    assert BLOB.fullmatch(blob_name(make_id("task", 0, bytes(10)), 0, "0f" * 32, "image/png"))


def test_a_tasks_event_is_a_structured_cloudevent() -> None:
    """Its data is the task with links."""
    kept = task_document(task(State.COMPLETED), [IMAGE])
    row = {
        "id": "evt_1",
        "sequence": 42,
        "type": "image.task.completed",
        "task_id": "task_1",
        "time": 1757165031999,
        "data": kept,
    }
    event = event_document(row, Links(BASE))
    assert event == {
        "specversion": "1.0",
        "id": "evt_1",
        "source": BASE,
        "type": "image.task.completed",
        "subject": "task_1",
        "time": "2025-09-06T13:23:51.999Z",
        "datacontenttype": "application/json",
        "sequence": "00000000000000000042",
        "data": with_links(kept, Links(BASE)),
    }


def test_an_operators_event_keeps_its_data() -> None:
    """Nothing is added to it. Without a task, its subject is the id in its data, because the
    CloudEvents libraries refuse null.
    """
    data = {"endpoint_id": "ep_1"}
    row = {
        "id": "evt_1",
        "sequence": 1,
        "type": "endpoint.disabled",
        "task_id": None,
        "time": 0,
        "data": data,
    }
    event = event_document(row, Links(BASE))
    assert (event["data"], event["subject"]) == (data, "ep_1")


@pytest.mark.parametrize(
    ("pattern", "type", "taken"),
    [
        ("*", "image.task.completed", True),
        ("image.task.completed", "image.task.completed", True),
        ("image.task.*", "image.task.completed", True),
        ("image.*", "image.task.completed", True),
        ("image.task.*", "image.task", False),
        ("image.task.*", "image.tasks.completed", False),
        ("image.task", "image.task.completed", False),
        ("image.task.comp*", "image.task.completed", False),
        (".*", "image.task.completed", False),
        ("", "image.task.completed", False),
    ],
)
def test_a_pattern_matches_whole_words(pattern: str, type: str, taken: bool) -> None:
    """A pattern matches every type, one type, or all types below a name."""
    assert type_matches(pattern, type) is taken


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "0.000001"), (-1, "-0.000001"), (10**8, "100"), (5_500_000, "5.5")],
)
def test_credits_in_a_message_have_no_exponent(value: int, text: str) -> None:
    assert credits_text(value) == text
