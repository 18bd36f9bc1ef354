"""Settings: their sources, their typed values, and the message for a wrong one
(docs/settings.md).
"""

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from pathlib import Path

import pytest

from service.backends import secret_keys
from service.errors import ConfigurationError
from service.settings import CALLBACK_URL_CHARS, Settings, load_settings, masked
from tests.docs.render import settings_table

KEY = "k" * 32


def settings(**variables: str) -> Settings:
    return load_settings({f"DARKROOM_{name}": value for name, value in variables.items()}, None)


def error_for(**variables: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        settings(**variables)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- defaults and forms
# ----------------------------------------------------------------------------------------------


def test_an_empty_environment_gives_the_documented_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    got = load_settings({})
    assert (got.host, got.port, got.base_url, got.callback_url) == (
        "127.0.0.1",
        8080,
        "http://127.0.0.1:8080",
        None,
    )
    assert got.data_dir == tmp_path / "data"
    assert got.database_url == f"sqlite:///{tmp_path}/data/darkroom.db"
    assert got.sqlite_path == tmp_path / "data" / "darkroom.db"
    assert got.image_dir == tmp_path / "data" / "images"
    assert got.blob_url == f"file://{tmp_path}/data/images"
    assert (
        got.secret_key,
        got.admin_key,
        got.evolink_api_key,
        got.metrics_port,
        got.reconcile_after_s,
    ) == (None,) * 5
    assert (got.evolink_base_url, got.evolink_result_hosts, got.evolink_confirm) == (
        "https://api.evolink.ai",
        (".evolink.ai",),
        "always",
    )
    assert (got.evolink_concurrency, got.evolink_task_ttl_s, got.evolink_result_ttl_s) == (
        16,
        86400,
        86400,
    )
    assert (got.upstream_networks, got.endpoint_networks, got.task_callback_networks) == (
        (),
        (),
        (),
    )
    assert (got.submit_timeout_s, got.submit_schedule, got.submit_give_up_s) == (
        60,
        (1, 2, 5, 15, 30, 60),
        3600,
    )
    assert (got.uncertain, got.uncertain_after_s, got.query_timeout_s) == ("fail", 900, 15)
    assert (got.download_schedule, got.download_concurrency, got.decode_concurrency) == (
        (1, 2, 5, 15, 60, 300, 900),
        16,
        max(1, len(os.sched_getaffinity(0)) - 1),
    )
    assert (got.max_image_bytes, got.max_image_pixels, got.min_free_bytes) == (
        52428800,
        67108864,
        1073741824,
    )
    assert list(got.delivery_schedule) == [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    assert (got.delivery_timeout_s, got.endpoint_disable_after_s) == (15, 432000)
    assert (got.retention_days, got.image_retention_days) == (30, None)
    assert (got.log_format, got.log_level, got.log_prompts, got.migrate) == (
        "json",
        "info",
        False,
        "on",
    )
    assert (got.url, got.api_key) == ("http://127.0.0.1:8080", None)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("PORT", "0", 0),
        ("SUBMIT_SCHEDULE", "0.5, 2,", (0.5, 2)),
        (
            "UPSTREAM_NETWORKS",
            "127.0.0.0/8, fd00::/8,10.1.2.3",
            (ip_network("127.0.0.0/8"), ip_network("fd00::/8"), ip_network("10.1.2.3")),
        ),
        (
            "EVOLINK_RESULT_HOSTS",
            ".Example.com,127.0.0.1,::1,localhost",
            (".example.com", "127.0.0.1", "::1", "localhost"),
        ),
        ("LOG_LEVEL", "DEBUG", "debug"),
        ("LOG_PROMPTS", "true", True),
        ("MIGRATE", "off", "off"),
        ("UNCERTAIN", "resubmit", "resubmit"),
        ("RECONCILE_AFTER_S", "2.5", 2.5),
        ("METRICS_PORT", "9090", 9090),
        ("IMAGE_RETENTION_DAYS", "7", 7),
        ("BASE_URL", "https://darkroom.example/sub/", "https://darkroom.example/sub"),
        ("CALLBACK_URL", "https://hooks.example:8443/a/", "https://hooks.example:8443/a"),
        (
            "DATABASE_URL",
            "postgresql://u:p%40ss@db:5432/darkroom?sslmode=require",
            "postgresql://u:p%40ss@db:5432/darkroom?sslmode=require",
        ),
        ("DATABASE_URL", "sqlite:////srv/x.db", "sqlite:////srv/x.db"),
        ("BLOB_URL", "file:///srv/images", "file:///srv/images"),
        ("BLOB_URL", "s3://my.bucket-1/a/b_2", "s3://my.bucket-1/a/b_2"),
        ("IMAGE_BASE_URL", "https://cdn.example/images/", "https://cdn.example/images"),
        ("IMAGE_LINK_TTL_S", "0", 0),
        ("IMAGE_LINK_TTL_S", "3600", 3600),
        ("URL", "http://darkroom.internal/", "http://darkroom.internal"),
        ("URL", "https://darkroom.example/sub/v1/", "https://darkroom.example/sub"),
        ("EVOLINK_RESULT_HOSTS", "*.evolink.ai", (".evolink.ai",)),
    ],
)
def test_a_text_becomes_its_typed_value(variable: str, text: str, value: object) -> None:
    """Lists are comma-separated, words may have any case, and URLs lose their last slash."""
    assert getattr(settings(**{variable: text}), variable.lower()) == value


API = "https://api.evolink.ai"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"{API}/", API),
        (f"{API}/v1", API),
        (f"{API}/v1/", API),
        (f"{API}//v1//", API),
        (f"{API}/V1", API),
        (f"{API}:443/v1", f"{API}:443"),
        (f"{API}/v1/images/generations", API),
        (f"{API}/v1/credits", API),
        ("https://gateway.example/evolink/v1/", "https://gateway.example/evolink"),
        ("HTTPS://API.evolink.ai/v1", "HTTPS://API.evolink.ai"),
        (f"  {API}/v1\n", API),
        (f'"{API}/v1"', API),
        (f"'{API}/v1/ '", API),
    ],
)
def test_the_upstreams_address_may_be_copied_from_anywhere(text: str, value: str) -> None:
    """Its version and the path of an example are left off, because each call appends them."""
    assert settings(EVOLINK_BASE_URL=text).evolink_base_url == value


@pytest.mark.parametrize(
    "around", ["{}\n", " {} ", "\t{}\r\n", '"{}"', "'{}'", '" {} "', "\u00a0{}"]
)
def test_blanks_and_quotes_around_a_value_are_left_off(around: str) -> None:
    """`docker run --env-file` keeps quotes, and a secret made with `echo` has a line end."""
    got = settings(
        EVOLINK_API_KEY=around.format("sk-1"),
        PORT=around.format("9000"),
        DATA_DIR=around.format("/srv/darkroom"),
        LOG_PROMPTS=around.format("true"),
        IMAGE_BASE_URL=around.format(""),
    )
    assert got.evolink_api_key is not None
    assert got.evolink_api_key.get_secret_value() == "sk-1"
    assert (got.port, str(got.data_dir), got.log_prompts) == (9000, "/srv/darkroom", True)
    assert got.image_base_url is None


def test_quotes_of_a_secret_key_stay() -> None:
    """They were part of the key when it signed."""
    quoted = f'"{KEY}"'
    given = settings(SECRET_KEY=f" {quoted}\n").secret_key
    assert given is not None
    assert given.get_secret_value() == quoted


def test_the_base_url_has_an_ipv6_address_in_brackets() -> None:
    """The base URL follows host and port and is valid for every host."""
    assert settings(HOST="::1", PORT="9000").base_url == "http://[::1]:9000"


def test_paths_follow_the_data_folder(tmp_path: Path) -> None:
    """`{data_dir}` in a URL stands for the folder, also in a URL that the operator sets."""
    got = settings(DATA_DIR=str(tmp_path), DATABASE_URL="sqlite:///{data_dir}/other.db")
    assert (got.sqlite_path, got.image_dir) == (tmp_path / "other.db", tmp_path / "images")


def test_on_s3_images_pass_through_the_data_folder(tmp_path: Path) -> None:
    """Images on their way to S3 have their own folder."""
    assert (
        settings(DATA_DIR=str(tmp_path), BLOB_URL="s3://bucket").image_dir == tmp_path / "incoming"
    )


def test_postgresql_has_no_database_file() -> None:
    assert settings(DATABASE_URL="postgresql://db/darkroom").sqlite_path is None


# --- where values come from
# ------------------------------------------------------------------------------------------


def test_the_environment_wins_over_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    """Overrides win over the environment, and the environment wins over `.env`."""
    file = tmp_path / ".env"
    file.write_text(
        "# ours\nDARKROOM_PORT=1\nDARKROOM_HOST='0.0.0.0'\nexport"
        " DARKROOM_LOG_LEVEL=error\nOTHER=x\n"
    )
    network = ip_network("127.0.0.0/8")
    got = load_settings(
        {"DARKROOM_PORT": "2", "DARKROOM_HOST": "::", "HOME": "/"},
        file,
        host="localhost",
        upstream_networks=(network,),
    )
    assert (got.host, got.port, got.log_level, got.upstream_networks) == (
        "localhost",
        2,
        "error",
        (network,),
    )


def test_without_a_mapping_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program calls `load_settings()` without arguments."""
    monkeypatch.setattr(os, "environ", {"DARKROOM_PORT": "8181"})
    assert load_settings(env_file=None).port == 8181


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    """`X=` in the environment also cancels the value in `.env`."""
    file = tmp_path / ".env"
    file.write_text("DARKROOM_CALLBACK_URL=https://hooks.example\nDARKROOM_PORT=\n")
    got = load_settings({"DARKROOM_CALLBACK_URL": ""}, file)
    assert (got.callback_url, got.port) == (None, 8080)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DARKROOM_PORT", "tcp://10.0.0.11:8080"),
        ("DARKROOM_METRICS_PORT", "udp://10.0.0.11:9090"),
        ("DARKROOM_SERVICE_HOST", "10.0.0.11"),
        ("DARKROOM_SERVICE_PORT", "8080"),
        ("DARKROOM_SERVICE_PORT_HTTP", "8080"),
        ("DARKROOM_PORT_8080_TCP", "tcp://10.0.0.11:8080"),
        ("DARKROOM_PORT_8080_TCP_PROTO", "tcp"),
        ("DARKROOM_PORT_8080_TCP_PORT", "8080"),
        ("DARKROOM_PORT_8080_TCP_ADDR", "10.0.0.11"),
        ("DARKROOM_WEB_SERVICE_HOST", "10.0.0.11"),
        ("DARKROOM_WEB_PORT", "tcp://10.0.0.11:8080"),
        ("DARKROOM_WEB_PORT_8080_UDP_ADDR", "10.0.0.11"),
        ("DARKROOM_TEST_POSTGRES_URL", "postgresql://x"),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_variables_of_a_cluster_or_a_test_run_are_ignored(
    name: str, value: str, in_file: bool, tmp_path: Path
) -> None:
    """Kubernetes service links and DARKROOM_TEST_ are no settings, neither in the environment nor
    in `.env`.
    """
    file = tmp_path / ".env"
    file.write_text(f"{name}={value}\n" if in_file else "DARKROOM_PORT=9000\n")
    got = load_settings({} if in_file else {name: value}, file)
    assert (got.port, got.metrics_port) == (8080 if in_file else 9000, None)


# --- wrong values


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DARKROOM_PROT", "DARKROOM_PORT"),
        ("darkroom_port", "DARKROOM_PORT"),
        ("DARKROOM_XYZZY_QUUX", ""),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_an_unknown_name_stops_the_start(
    name: str, hint: str, in_file: bool, tmp_path: Path
) -> None:
    """The message suggests the setting that may have been meant."""
    file = tmp_path / ".env"
    file.write_text(f"{name}=1\n" if in_file else "")
    with pytest.raises(ConfigurationError) as caught:
        load_settings({} if in_file else {name: "1"}, file)
    assert str(caught.value) == f"{name} is not a setting" + (
        f"; did you mean {hint}?" if hint else ""
    )


def test_a_name_without_a_value_in_the_file_stops_the_start(tmp_path: Path) -> None:
    """A line of `.env` that sets nothing is a mistake."""
    (tmp_path / ".env").write_text("DARKROOM_CALLBACK_URL\n")
    with pytest.raises(ConfigurationError, match="DARKROOM_CALLBACK_URL has no value in "):
        load_settings({}, tmp_path / ".env")


@pytest.mark.parametrize("line", ['="https://x.example', "='https://x.example'/", " x"])
def test_a_setting_in_a_broken_line_of_the_file_stops_the_start(line: str, tmp_path: Path) -> None:
    """python-dotenv skips such a line, and the setting would have its default."""
    text = f"A b c\nDARKROOM_PORT=1\n\n\nDARKROOM_CALLBACK_URL{line}\nDARKROOM_HOST=::1\n"
    (tmp_path / ".env").write_text(text)
    with pytest.raises(ConfigurationError, match="line 5: DARKROOM_CALLBACK_URL cannot be read: "):
        load_settings({}, tmp_path / ".env")


def test_a_broken_line_that_sets_nothing_is_passed_over(tmp_path: Path) -> None:
    text = 'source /etc/darkroom_env x\necho "$DARKROOM_PORT" now\nDARKROOM_PORT=81\n'
    (tmp_path / ".env").write_text(text)
    assert load_settings({}, tmp_path / ".env").port == 81


def test_an_unreadable_file_stops_the_start(tmp_path: Path) -> None:
    """A `.env` that is no text is not skipped."""
    (tmp_path / ".env").write_bytes(b"DARKROOM_HOST=\xff\xfe\n")
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read: UnicodeDecodeError"):
        load_settings({}, tmp_path / ".env")


@pytest.mark.parametrize(
    ("variable", "text", "limit"),
    [
        ("HOST", "a b", "pattern"),
        ("PORT", "http", "valid integer"),
        ("PORT", "65536", "65535"),
        ("METRICS_PORT", "-1", "greater than or equal to 0"),
        ("METRICS_PORT", "8080", "differ from DARKROOM_PORT"),
        ("BASE_URL", "darkroom.example", "http or https"),
        ("BASE_URL", "ftp://darkroom.example", "http or https"),
        ("BASE_URL", "http://u:p@darkroom.example", "no user"),
        ("BASE_URL", "http://darkroom.example:99999", "valid host and port"),
        ("BASE_URL", "http://[::1", "valid host and port"),
        ("BASE_URL", "http://dark room.example", "without spaces"),
        ("BASE_URL", "http://dark\\room.example", "with a host"),
        ("CALLBACK_URL", "http://hooks.example", "https"),
        ("CALLBACK_URL", "http://10.0.0.1", "DARKROOM_UPSTREAM_NETWORKS"),
        ("CALLBACK_URL", "https://hooks.example/?a=b", "query"),
        ("CALLBACK_URL", "https://hooks.example/#a", "fragment"),
        (
            "CALLBACK_URL",
            "https://hooks.example/" + "a" * CALLBACK_URL_CHARS,
            str(CALLBACK_URL_CHARS),
        ),
        ("DATA_DIR", "~nobody-of-that-name/x", "user that exists"),
        ("DATABASE_URL", "mysql://db/x", "postgresql://"),
        ("DATABASE_URL", "sqlite://", "sqlite:///FILE"),
        ("DATABASE_URL", "sqlite:///:memory:", "sqlite:///FILE"),
        ("DATABASE_URL", "sqlite:///x.db?mode=ro", "no options"),
        ("BLOB_URL", "s3://bucket/../prefix", "s3://BUCKET/PREFIX"),
        ("BLOB_URL", "s3://key:secret@bucket", "s3://BUCKET/PREFIX"),
        ("BLOB_URL", "s3://Bucket_/x?region=y", "s3://BUCKET/PREFIX"),
        ("BLOB_URL", "https://s3.example/bucket", "s3://BUCKET/PREFIX"),
        ("BLOB_URL", "file://images", "absolute"),
        ("IMAGE_BASE_URL", "cdn.example", "http or https"),
        ("IMAGE_BASE_URL", "https://cdn.example/?v=1", "query"),
        ("IMAGE_LINK_TTL_S", "-1", "greater than or equal to 0"),
        ("SECRET_KEY", "short", "32 bytes"),
        ("SECRET_KEY", f"{KEY},", "32 bytes"),
        ("ADMIN_KEY", "fifteen-chars..", "16 characters"),
        ("ADMIN_KEY", "sixteen characters", "without spaces"),
        ("EVOLINK_API_KEY", "sk-\nx", "visible ASCII"),
        ("EVOLINK_BASE_URL", "http://api.evolink.ai", "DARKROOM_UPSTREAM_NETWORKS"),
        ("EVOLINK_BASE_URL", "api.evolink.ai", "http or https"),
        ("EVOLINK_BASE_URL", "https:/api.evolink.ai", "http or https"),
        ("EVOLINK_BASE_URL", "https://https://api.evolink.ai", "http or https"),
        ("EVOLINK_BASE_URL", "https://api.evolink.ai/v1?key=x", "query"),
        ("EVOLINK_BASE_URL", "https://api.evolink.ai/v1#x", "fragment"),
        ("EVOLINK_BASE_URL", "https://10.0.0.1/v1", "DARKROOM_UPSTREAM_NETWORKS"),
        ("EVOLINK_BASE_URL", "https://localhost", "DARKROOM_UPSTREAM_NETWORKS"),
        ("EVOLINK_API_KEY", "Bearer sk-1", "without spaces"),
        ("EVOLINK_API_KEY", "\u201csk-1\u201d", "visible ASCII"),
        ("CALLBACK_URL", "https://127.0.0.1:8443", "DARKROOM_UPSTREAM_NETWORKS"),
        ("CALLBACK_URL", "https://[fd00::1]", "DARKROOM_UPSTREAM_NETWORKS"),
        ("CALLBACK_URL", "https://localhost:8443", "DARKROOM_UPSTREAM_NETWORKS"),
        ("CALLBACK_URL", "https://darkroom", "DARKROOM_UPSTREAM_NETWORKS"),
        ("EVOLINK_RESULT_HOSTS", "https://files.example", "host"),
        ("EVOLINK_RESULT_HOSTS", ",", "at least 1 item"),
        ("EVOLINK_CONFIRM", "maybe", "'always' or 'never'"),
        ("EVOLINK_CONCURRENCY", "0", "greater than or equal to 1"),
        ("SUBMIT_TIMEOUT_S", "0", "greater than 0"),
        ("SUBMIT_TIMEOUT_S", "nan", "finite"),
        ("SUBMIT_TIMEOUT_S", "1e99", "less than"),
        ("SUBMIT_TIMEOUT_S", "1501", "less than or equal to 1500"),
        ("SUBMIT_SCHEDULE", "1,x", "item 2 should be a valid number"),
        ("DOWNLOAD_SCHEDULE", "1,2,0", "item 3 should be greater than 0"),
        ("DELIVERY_SCHEDULE", ",", "at least 1 item"),
        ("UPSTREAM_NETWORKS", "127.0.0.0/8,10.0.0.1/8", "item 2 should be a network"),
        ("UNCERTAIN", "retry", "'fail' or 'resubmit'"),
        ("MAX_IMAGE_BYTES", "-5", "1024"),
        ("RETENTION_DAYS", "0", "greater than 0"),
        ("LOG_FORMAT", "text", "'json' or 'console'"),
        ("LOG_PROMPTS", "perhaps", "boolean"),
        ("MIGRATE", "later", "'on' or 'off'"),
    ],
)
def test_a_bad_value_is_one_line_with_variable_and_limit(
    variable: str, text: str, limit: str
) -> None:
    """An operator sees which variable to change, and to what."""
    said = error_for(**{variable: text})
    assert said.startswith(f"DARKROOM_{variable}: ")
    assert limit in said


def test_every_wrong_value_is_named_in_one_line() -> None:
    """An operator can correct two mistakes before the next start."""
    assert re.fullmatch(
        r"DARKROOM_PORT: .*; DARKROOM_MIGRATE: .*", error_for(PORT="x", MIGRATE="x")
    )


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SECRET_KEY", "pa55word"),
        ("ADMIN_KEY", "pa55word"),
        ("ADMIN_KEY", "pa55word with spaces in it"),
        ("EVOLINK_API_KEY", "pa55word\u00e9"),
        ("DATABASE_URL", "mysql://u:pa55word@db/x"),
        ("DATABASE_URL", "postgresql://u:pa55word/more@db/x"),
        ("DATABASE_URL", "postgresql://u:12/pa55word@db/x"),
        ("DATABASE_URL", "postgresql://u:12?pa55word@db/x"),
        ("DATABASE_URL", "postgresql://u:12#pa55word@db/x"),
        ("DATABASE_URL", "postgresql://u:p@[pa55word/x"),
        ("CALLBACK_URL", "https://u:pa55word@hooks.example"),
    ],
)
def test_an_error_message_never_contains_a_secret(variable: str, text: str) -> None:
    """The line names the variable and shows no part of a malformed secret."""
    said = error_for(**{variable: text})
    assert said.startswith(f"DARKROOM_{variable}: ")
    assert "pa55" not in said


@pytest.mark.parametrize(
    ("networks", "url", "fine"),
    [
        ("127.0.0.0/8", "http://127.0.0.1:8080", True),
        ("fd00::/8", "http://[fd00::1]:8080", True),
        ("10.0.0.0/8", "http://127.0.0.1:8080", False),
        ("127.0.0.0/8", "http://localhost:8080", False),
        ("127.0.0.0/8", "https://hooks.example", True),
    ],
)
def test_plain_callbacks_need_a_literal_address_inside_the_networks(
    networks: str, url: str, fine: bool
) -> None:
    """Plain http is for an upstream in the operator's own network, given by its address."""
    if fine:
        assert settings(UPSTREAM_NETWORKS=networks, CALLBACK_URL=url).callback_url == url
    else:
        assert error_for(UPSTREAM_NETWORKS=networks, CALLBACK_URL=url).startswith(
            "DARKROOM_CALLBACK_URL: should be https"
        )


@pytest.mark.parametrize(
    ("url", "fine"),
    [("http://127.0.0.1:1", True), ("http://sandbox:1", True), ("http://10.0.0.1:1", False)],
)
def test_a_plain_http_upstream_must_be_inside_the_networks(url: str, fine: bool) -> None:
    """An address is checked here. A name is checked when it is resolved."""
    if fine:
        assert (
            settings(UPSTREAM_NETWORKS="127.0.0.0/8", EVOLINK_BASE_URL=url).evolink_base_url == url
        )
    else:
        assert "https" in error_for(UPSTREAM_NETWORKS="127.0.0.0/8", EVOLINK_BASE_URL=url)


def test_an_unknown_override_is_refused() -> None:
    """A field that does not exist is our own typing error."""
    with pytest.raises(ConfigurationError, match="DARKROOM_PROT: "):
        load_settings({}, None, prot=1)


# --- display


def test_no_secret_is_shown_anywhere() -> None:
    """Neither the logged settings nor the object's text contain a secret or a database password."""
    secret = {
        name: f"pa55word-{name}-" + "x" * 32
        for name in ("SECRET_KEY", "ADMIN_KEY", "EVOLINK_API_KEY", "API_KEY")
    }
    got = settings(
        **secret, DATABASE_URL="postgresql://user:pa55word@db:5432/darkroom?password=pa55word"
    )
    shown = masked(got)
    assert [shown[name.lower()] for name in secret] == ["***"] * 4
    assert shown["database_url"] == "postgresql://***@db:5432/darkroom"
    assert "pa55" not in f"{shown} {got!r} {got}"


def test_masked_settings_are_plain_values(tmp_path: Path) -> None:
    """The log line has every setting in the form in which it is written."""
    shown = masked(
        settings(
            DATA_DIR=str(tmp_path), UPSTREAM_NETWORKS="127.0.0.0/8,::1", SUBMIT_SCHEDULE="0.5,2"
        )
    )
    assert shown.keys() == Settings.model_fields.keys()
    assert all(value is None or isinstance(value, int | float | str) for value in shown.values())
    assert (shown["data_dir"], shown["upstream_networks"], shown["submit_schedule"]) == (
        str(tmp_path),
        "127.0.0.0/8,::1/128",
        "0.5,2",
    )
    assert shown["database_url"] == f"sqlite:///{tmp_path}/darkroom.db"
    assert (
        masked(settings(DATABASE_URL="postgresql://db/darkroom"))["database_url"]
        == "postgresql://db/darkroom"
    )


def test_the_table_has_a_row_for_every_setting() -> None:
    """The table of docs/settings.md is made from the fields."""
    rows = settings_table().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == [
        f"DARKROOM_{name.upper()}" for name in Settings.model_fields
    ]
    assert all(row.count("|") == 4 for row in rows)
    assert "| `DARKROOM_PORT` | `8080` | Port to listen on. 0 takes any free port. |" in rows
    assert any(row.startswith("| `DARKROOM_UPSTREAM_NETWORKS` | empty |") for row in rows)
    assert any(row.startswith("| `DARKROOM_CALLBACK_URL` | unset |") for row in rows)
    assert any(row.startswith("| `DARKROOM_LOG_PROMPTS` | `false` |") for row in rows)
    assert any(row.startswith("| `DARKROOM_SUBMIT_SCHEDULE` | `1,2,5,15,30,60` |") for row in rows)


# --- the secret key
# --------------------------------------------------------------------------------------------------


def test_given_keys_are_used_in_their_order(tmp_path: Path) -> None:
    """The first key signs, and no file is written."""
    assert secret_keys(settings(DATA_DIR=str(tmp_path), SECRET_KEY=f" {KEY} , {'n' * 33}")) == [
        KEY.encode(),
        b"n" * 33,
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    """On SQLite, the key comes from a file that only its owner may read, and stays the same."""
    wanted = settings(DATA_DIR=str(tmp_path / "new" / "data"))
    made = secret_keys(wanted)
    file = tmp_path / "new" / "data" / "secret.key"
    assert len(made) == 1
    assert len(made[0]) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["secret.key"]
    assert secret_keys(wanted) == made


def test_processes_that_start_together_get_one_key(tmp_path: Path) -> None:
    """The first process writes it, and the rest read it."""
    wanted = settings(DATA_DIR=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: secret_keys(wanted), range(64)))
    assert all(keys == made[0] for keys in made)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.key"]


def test_keys_in_the_file_may_be_rotated(tmp_path: Path) -> None:
    """The file has the form of the variable."""
    (tmp_path / "secret.key").write_text(f"{KEY},{'n' * 32}\n")
    assert secret_keys(settings(DATA_DIR=str(tmp_path))) == [KEY.encode(), b"n" * 32]


@pytest.mark.parametrize("content", [b"", b"pa55word\n", b"\xff" * 64])
def test_a_spoilt_key_file_stops_the_start(content: bytes, tmp_path: Path) -> None:
    """A damaged key is not replaced, because its signatures would become invalid."""
    (tmp_path / "secret.key").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        secret_keys(settings(DATA_DIR=str(tmp_path)))
    assert str(caught.value).startswith(f"{tmp_path}/secret.key should hold")
    assert "pa55" not in str(caught.value)
    assert (tmp_path / "secret.key").read_bytes() == content


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    """One line names the file and what to do."""
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigurationError, match=r"secret\.key: .*; set DARKROOM_SECRET_KEY"):
        secret_keys(settings(DATA_DIR=str(tmp_path / "data")))


def test_postgresql_needs_a_given_key(tmp_path: Path) -> None:
    """Several processes must share one key, so none is generated."""
    with pytest.raises(ConfigurationError, match="DARKROOM_SECRET_KEY is required with PostgreSQL"):
        secret_keys(settings(DATA_DIR=str(tmp_path), DATABASE_URL="postgresql://db/darkroom"))


def test_links_of_another_host_cannot_expire() -> None:
    """A CDN serves images without this service, so it cannot check signatures."""
    said = error_for(IMAGE_BASE_URL="https://cdn.example/i", IMAGE_LINK_TTL_S="60")
    assert said.startswith("DARKROOM_IMAGE_LINK_TTL_S: ")
    assert "DARKROOM_IMAGE_BASE_URL" in said
