"""The clients of others that the tests run: which version does which journey in which test."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.sbom import locked
from tests.bench.program import markdown

ROOT = Path(__file__).parents[2]
PYPI, NPM = "requirements-dev.lock", "tests/consumers/package-lock.json"
KILLED = "test_consumers_that_are_killed_end_with_every_event_once"
VERIFY = "test_the_libraries_accept_what_is_sent_also_while_secrets_overlap"
RECEIVE = "test_a_receiver_takes_each_event_once_and_nothing_forged"
STREAM = "test_a_reader_of_a_silent_stream_sees_events_alone"


@dataclass(frozen=True, slots=True)
class Client:
    """`package`: its name in a lock, whose version the tests run. Without one, a program of our own
    makes the client's requests, and `version` is the one that they were read from. `tests`: the
    functions by their file under tests/.
    """

    name: str
    journey: str
    tests: Mapping[str, Sequence[str]]
    lock: str | None = None
    package: str = ""
    version: str = "–"

    def row(self) -> tuple[str, ...]:
        runs = f"from {'npm' if self.lock == NPM else 'PyPI'}" if self.lock else "our own program"
        version = self.version if self.lock is None else version_of(self.lock, self.package)
        files = ", ".join(f"`tests/{file}`" for file in self.tests)
        return self.name, version, runs, self.journey, files


TOOLS = "consumers/test_tool_server.py"
SCRIPTS = "integration/test_poll_scripts.py"
READERS = "integration/test_stream_readers.py"
OPENAI = "integration/test_openai_clients.py"
NODE = "consumers/test_node_clients.py"
SPELLINGS = "integration/test_spellings.py"
STATUSES = "integration/test_documented_statuses.py"
SAVES = "test_a_script_saves_the_image_of_its_default_model"
ENDS = "test_a_script_ends_with_the_reason_of_a_failure"

CLIENTS = (
    Client(
        "the upstream's tool server, `@evolinkai/evolink-media`, with other base URLs",
        "every image model, upload by path and in base64, list, quota, delete, edit, check, errors",
        {
            TOOLS: (
                "test_every_image_model_of_its_list_makes_an_image",
                "test_files_are_uploaded_listed_counted_and_deleted",
                "test_uploaded_pictures_are_edited_in_their_order",
                "test_the_tool_explains_why_a_task_failed",
            )
        },
        NPM,
        "@evolinkai/evolink-media",
    ),
    Client(
        "`sunshare/evolink-imagegen`",
        "submit, poll, save with the extension of the link, a cancelled task, a refusal",
        {SCRIPTS: (SAVES, ENDS)},
        version="commit 2ee6e6f",
    ),
    Client(
        "the nanobanana skill, `evolink-nanobanana-2-lite`",
        "the check of the key, submit, poll, the link of the result, a cancelled task, a refusal",
        {SCRIPTS: (SAVES, ENDS, "test_a_key_is_checked_for_free")},
        version="commit 280fd06",
    ),
    Client(
        "the nodes of `torans/ComfyUI_EvoLink`",
        "submit with all options and a picture, poll, download, a cancelled task, a refusal",
        {SCRIPTS: (SAVES, ENDS, "test_a_node_sends_several_images_and_a_ratio")},
        version="commit 55a33c9",
    ),
    Client(
        "clients that know only the documented statuses and addresses",
        "a cancelled task, `GET /v1/images/generations/{id}`, ids of the form `task-unified-…`",
        {
            STATUSES: (
                "test_a_task_that_the_upstream_cancelled_is_failed",
                "test_a_task_is_under_the_address_of_its_submission",
                "test_ids_may_have_the_upstreams_form",
            )
        },
    ),
    Client(
        "simple scripts",
        "a trailing slash, an empty `callback_url`, a file name from a link",
        {
            SPELLINGS: (
                "test_a_path_may_end_with_a_slash",
                "test_an_empty_callback_url_is_none",
                "test_a_link_ends_with_the_extension_of_its_image",
            )
        },
    ),
    Client(
        "openai for Python",
        "`images.generate` with `Prefer: wait`, `data[0].url`, a refusal",
        {
            OPENAI: (
                "test_the_library_gets_the_links_of_the_images",
                "test_the_library_raises_for_a_refusal",
            )
        },
        PYPI,
        "openai",
    ),
    Client(
        "openai for JavaScript",
        "the same",
        {NODE: ("test_openai_gets_the_links_of_the_images", "test_openai_raises_for_a_refusal")},
        NPM,
        "openai",
    ),
    Client(
        "litellm",
        "`image_generation` with `extra_headers`, `data[0].url`",
        {OPENAI: ("test_litellm_gets_the_links_of_the_images",)},
        version="1.110.2",
    ),
    Client(
        "httpx-sse", "a stream that is silent for a while", {READERS: (STREAM,)}, PYPI, "httpx-sse"
    ),
    Client("sseclient-py", "the same", {READERS: (STREAM,)}, PYPI, "sseclient-py"),
    Client(
        "eventsource for JavaScript",
        "the same",
        {NODE: ("test_eventsource_sees_events_alone",)},
        NPM,
        "eventsource",
    ),
    Client(
        "the parsing rules of WHATWG HTML, 9.2.6",
        "the same, and the examples of the standard",
        {READERS: (STREAM, "test_the_parsing_rules_read_the_examples_of_the_standard")},
    ),
    *(
        Client(
            f"{package} for {language}",
            f"verify deliveries, also while two secrets are valid, and receive them in {servers}",
            {"consumers/test_judges.py": (VERIFY,), "consumers/test_receivers.py": (RECEIVE,)},
            lock,
            package,
        )
        for lock, language, servers in (
            (PYPI, "Python", "Starlette, FastAPI and Flask"),
            (NPM, "JavaScript", "Node's own server and Express"),
        )
        for package in ("standardwebhooks", "svix")
    ),
    *(
        Client(
            f"types that {package} makes from the OpenAPI document",
            "a typed program submits, waits, receives and verifies",
            {
                "consumers/test_typed_clients.py": (
                    "test_a_typed_program_submits_waits_receives_and_verifies",
                    "test_a_checker_refuses_a_misspelled_field",
                )
            },
            lock,
            package,
        )
        for lock, package in ((PYPI, "datamodel-code-generator"), (NPM, "openapi-typescript"))
    ),
    Client(
        "nats-py",
        "events from a stream of NATS, across kills of the consumer",
        {"consumers/test_killed.py": (KILLED,)},
        PYPI,
        "nats-py",
    ),
)


def version_of(lock: str, package: str) -> str:
    """The version that a lock pins."""
    text = (ROOT / lock).read_text("utf-8")
    if lock == NPM:
        return str(json.loads(text)["packages"][f"node_modules/{package}"]["version"])
    (pin,) = (pin for pin in locked(text) if pin.name == package)
    return str(pin.specifier).removeprefix("==")


def clients_table() -> str:
    heads = ("client", "version", "run", "journey", "test")
    return markdown(heads, (client.row() for client in CLIENTS))
