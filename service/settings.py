"""The settings of contract section 2: read once, from the environment and `.env`, and handed to
what is built from them.

A field's name is its variable's name in lower case without the prefix; its description is its row
in the table of docs/settings.md. An empty variable is the same as one that is not set.
"""

import contextlib
import difflib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from service.errors import ConfigurationError
from service.folders import make_folder
from service.setting_types import (
    BUCKET,
    NOT_YET,
    PREFIX,
    SECRET_KEY_BYTES,
    AdminKey,
    Days,
    Folder,
    Hosts,
    Lower,
    Networks,
    Port,
    Requests,
    Schedule,
    Seconds,
    SecretKeys,
    Sinks,
    Slots,
    Token,
    address,
    keys_of,
    literal,
    ours,
    postgres,
    variables_of,
)

CALLBACK_URL_CHARS = (
    2048 - 128
    # the upstream's limit without "/callbacks/" 11 + an upstream 20 + "/" 1 + a task 31 + "/" 1 + a
    # token 64
)


def told(default: Any, words: str, shown: str | None = None, **limits: Any) -> Any:
    """A field with its default and its row of the table; `shown` stands there where the default is
    no plain value.
    """
    return Field(
        default,
        description=words,
        json_schema_extra=None if shown is None else {"shown": shown},
        **limits,
    )


class Settings(BaseSettings):
    """Every setting, checked. `load_settings` makes it; nothing is picked up from the environment
    behind its back.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=True,
        arbitrary_types_allowed=True,
    )

    host: str = told("127.0.0.1", "Address to listen on.", pattern=r"^[A-Za-z0-9._:%-]+$")
    port: Port = told(8080, "Port to listen on. 0 takes any free port.")
    base_url: str = told(
        "http://{host}:{port}", "The service's own address in links and in the `source` of events."
    )
    upstream_networks: Networks = told(
        (),
        "Comma-separated CIDRs outside the public internet that calls to the upstream and"
        " downloads of results may reach, also with plain http.",
    )
    endpoint_networks: Networks = told((), "The same for deliveries to endpoints.")
    task_callback_networks: Networks = told(
        (), "The same for deliveries to a task's own `callback_url`."
    )
    callback_url: str | None = told(
        None,
        "Public https prefix under which the upstream reaches `/callbacks/…`. Without it the"
        " service sends no `callback_url` and settles tasks by queries alone.",
    )
    data_dir: Folder = told(
        Path("./data"), "Directory of the embedded store and of the images.", shown="`./data`"
    )
    database_url: str = told(
        "sqlite:///{data_dir}/darkroom.db",
        "The store: `sqlite:///FILE` or `postgresql://…`.",
        repr=False,
    )
    blob_url: str = told(
        "file://{data_dir}/images",
        "Where images are stored: `file:///FOLDER`, or `s3://BUCKET/PREFIX` with the extra"
        " `s3` and the usual `AWS_…` variables.",
    )
    image_base_url: str | None = told(
        None,
        "Prefix of image links instead of `{base_url}/images`: a CDN or a public bucket that"
        " serves the same names.",
    )
    image_link_ttl_s: Annotated[float, NOT_YET] = told(
        0,
        "Lifetime of image links. 0 means that a link lives as long as its image. Other"
        " values are not supported yet.",
    )
    secret_key: SecretKeys | None = told(
        None,
        "Comma-separated keys of at least 32 bytes. The first key signs and encrypts. All"
        " keys verify and decrypt.",
        shown="on SQLite a new key in `{data_dir}/secret.key`, mode 600; on PostgreSQL required",
    )
    admin_key: AdminKey | None = told(
        None,
        "An API key of the owner `admin` with every scope, for first use. At least 16 characters.",
    )
    evolink_api_key: Token | None = told(
        None, "API key of the upstream.", shown="required by workers"
    )
    evolink_base_url: str = told("https://api.evolink.ai", "Address of the upstream.")
    evolink_result_hosts: Hosts = told(
        (".evolink.ai",),
        "Comma-separated hosts from which results may be downloaded. `.x` is every subdomain"
        " of x. `x` is exactly x.",
    )
    evolink_confirm: Annotated[Literal["always", "never"], Lower] = told(
        "always",
        "`always`: the service believes a callback only when a query agrees. `never`: the"
        " token in the callback's URL is enough.",
    )
    evolink_concurrency: Slots = told(16, "Concurrent calls to the upstream.")
    evolink_task_ttl_s: Seconds = told(86400, "How long the upstream keeps a task.")
    evolink_result_ttl_s: Seconds = told(
        86400, "How long the link of a result lives at the upstream."
    )
    submit_timeout_s: Annotated[float, Field(gt=0, le=1500, allow_inf_nan=False)] = told(
        60, "Timeout of one submission call."
    )
    submit_schedule: Schedule = told(
        (1, 2, 5, 15, 30, 60),
        "Waits between submission calls when nothing was created. The last wait repeats.",
    )
    submit_give_up_s: Seconds = told(
        3600, "After this time a task that could not be submitted fails with `not_submitted`."
    )
    uncertain: Annotated[Literal["fail", "resubmit"], Lower] = told(
        "fail",
        "Decision on a submission whose outcome stays unproved: `fail`, or `resubmit` under"
        " the same idempotency key.",
    )
    uncertain_after_s: Seconds = told(
        900, "How long a callback may still prove the outcome of a submission."
    )
    query_timeout_s: Seconds = told(15, "Timeout of one query call.")
    reconcile_after_s: Seconds | None = told(
        None,
        "Silence before the first query of a task. Without a callback URL the default is"
        " `max(3, estimated_time / 2)`.",
        shown="`max(60, 2 × estimated_time)`",
    )
    download_schedule: Schedule = told(
        (1, 2, 5, 15, 60, 300, 900), "Waits between attempts of a download. The last wait repeats."
    )
    download_concurrency: Slots = told(16, "Concurrent downloads.")
    decode_concurrency: Slots = told(
        1,
        "Images decoded at once. Each takes up to 24 bytes a pixel and three times its file size.",
    )
    max_image_bytes: int = told(
        52_428_800, "Largest result that the service stores, in bytes.", ge=1024
    )
    max_image_pixels: int = told(
        67_108_864, "Largest result that the service stores, in pixels.", ge=1024
    )
    delivery_schedule: Schedule = told(
        (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
        "Waits before each retry of a delivery. Each wait is extended by 0 to 20 %.",
    )
    delivery_timeout_s: Seconds = told(15, "Timeout of one delivery attempt.")
    endpoint_disable_after_s: Seconds = told(
        432_000, "The service disables an endpoint whose attempts have only failed for this long."
    )
    sinks: Sinks = told(
        (),
        "Comma-separated addresses of brokers that get every event, such as"
        " `nats://HOST:4222/SUBJECT?stream=NAME`. Needs the extra `brokers`.",
    )
    retention_days: Days = told(
        30, "How long the service keeps events, callbacks, deliveries and prompts."
    )
    image_retention_days: Days | None = told(
        None, "How long the service keeps images. Links then answer 410. Unset keeps them forever."
    )
    min_free_bytes: int = told(
        1_073_741_824,
        "Below this free disk space new submissions get 503. Callbacks never do.",
        ge=0,
    )
    key_requests: Requests | None = told(
        None,
        "Requests that one API key may send to each process, such as `600/minute`. Needs the"
        " extra `limits`. Unset means no limit.",
    )
    log_format: Annotated[Literal["json", "console"], Lower] = told(
        "json", "`json`, or `console` for people."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Lower] = told(
        "info", "`debug`, `info`, `warning` or `error`."
    )
    log_prompts: bool = told(False, "Whether log lines may contain prompts.")
    metrics_port: Port | None = told(
        None,
        "Port that serves `/metrics` without a key. On the main port `/metrics` needs a key"
        " with `read`.",
    )
    stop_s: Seconds = told(
        20, "After SIGTERM, how long requests and work in flight may still take."
    )
    migrate: Annotated[Literal["on", "off"], Lower] = told(
        "on", "`off`: a start stops on an old schema instead of migrating it."
    )
    url: str = told("http://127.0.0.1:8080", "For client commands: the address of the service.")
    api_key: Token | None = told(None, "For client commands: the key that they send.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @field_validator("base_url", "url", "evolink_base_url", "callback_url", "image_base_url")
    @classmethod
    def _address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        host, networks = (
            str(info.data.get("host", "localhost")),
            info.data.get("upstream_networks", ()),
        )
        value = (
            value.replace("{host}", f"[{host}]" if ":" in host else host)
            .replace("{port}", str(info.data.get("port", 0)))
            .rstrip("/")
        )
        parts = address(value)
        if info.field_name in ("evolink_base_url", "callback_url") and parts.scheme == "http":
            number = literal(parts.hostname or "")
            # A name of the upstream's is checked when it is resolved; a callback's host is resolved
            # by somebody else.
            if not (
                any(number in each for each in networks)
                if number
                else networks and info.field_name == "evolink_base_url"
            ):
                raise ValueError(
                    f"should be https: plain http is for addresses inside {PREFIX}UPSTREAM_NETWORKS"
                )
        if info.field_name == "callback_url" and len(value) > CALLBACK_URL_CHARS:
            raise ValueError(f"should have at most {CALLBACK_URL_CHARS} characters")
        return value

    @field_validator("database_url", "blob_url")
    @classmethod
    def _place(cls, value: str, info: ValidationInfo) -> str:
        value = value.replace("{data_dir}", str(info.data.get("data_dir", "/")))
        if info.field_name == "blob_url":
            if not value.startswith("file:///") and not BUCKET.fullmatch(value):
                raise ValueError("should be file:// and an absolute path, or s3://BUCKET/PREFIX")
        elif not value.startswith("sqlite:"):
            postgres(value)
        elif not re.fullmatch(r"sqlite:///[^:?][^?]*", value):
            raise ValueError("should be sqlite:///FILE, a file and no options")
        return value

    @field_validator("metrics_port")
    @classmethod
    def _its_own(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and value == info.data.get("port"):
            raise ValueError(f"should differ from {PREFIX}PORT")
        return value

    @property
    def sqlite_path(self) -> Path | None:
        """The embedded store's file; None on PostgreSQL."""
        return (
            Path(self.database_url.removeprefix("sqlite:///"))
            if self.database_url.startswith("sqlite:")
            else None
        )

    @property
    def key_file(self) -> Path:
        """Where the embedded store's key is, unless `secret_key` is set."""
        return self.data_dir / "secret.key"

    @property
    def key_is_missing(self) -> bool:
        """Whether `secret_keys` would make one."""
        return not self.secret_key and self.sqlite_path is not None and not self.key_file.exists()

    @property
    def image_dir(self) -> Path:
        """The folder of `blob_url`, or of what is on its way to S3."""
        return (
            Path(self.blob_url.removeprefix("file://"))
            if self.blob_url.startswith("file:")
            else self.data_dir / "incoming"
        )


# --- reading them
# --------------------------------------------------------------------------------------------------


def load_settings(
    environ: Mapping[str, str] | None = None, env_file: Path | None = Path(".env"), **overrides: Any
) -> Settings:
    """The settings: `.env`, over it the environment, over both `overrides` by field name, as text
    or typed.

    ConfigurationError: one line that names every variable that is unknown or wrong, and its limit;
    never a value.
    """
    values: dict[str, Any] = {}
    for source in (variables_of(env_file), os.environ if environ is None else environ):
        values.update({name: value for name, value in source.items() if ours(name, value)})
    known = {PREFIX + field.upper(): field for field in Settings.model_fields}
    for name in sorted(values):
        if name not in known:
            near = difflib.get_close_matches(name[len(PREFIX) :].lower(), known.values(), 1)
            raise ConfigurationError(
                f"{name} is not a setting"
                + (f"; did you mean {PREFIX}{near[0].upper()}?" if near else "")
            )
        if values[name] is None:
            raise ConfigurationError(f"{name} has no value in {env_file}: write {name}=…")
    try:
        return Settings(
            **{known[name]: value for name, value in values.items() if value != ""} | overrides
        )
    except ValidationError as error:
        raise ConfigurationError(
            "; ".join(complaint(each) for each in error.errors(include_input=False))
        ) from None


def complaint(error: ErrorDetails) -> str:
    field, *place = error["loc"]
    words = (
        str(error["ctx"]["error"])
        if error["type"] == "value_error"
        else error["msg"].removeprefix("Input ")
    )
    return f"{PREFIX}{str(field).upper()}: {f'item {int(place[0]) + 1} ' if place else ''}{words}"


# --- telling them
# --------------------------------------------------------------------------------------------------


def masked(settings: Settings) -> dict[str, Any]:
    """Every setting by its field's name, as JSON values fit for the log: no secret, nothing of a
    store's address but where it is.
    """
    shown = {
        name: "***" if isinstance(value, SecretStr) else log_value(value)
        for name, value in settings
    }
    if not settings.sqlite_path:
        parts = urlsplit(settings.database_url)
        login = "***@" if "@" in parts.netloc else ""
        hosts = parts.netloc.rpartition("@")[2]
        shown["database_url"] = f"postgresql://{login}{hosts}{parts.path}"
    return shown


def log_value(value: object) -> object:
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, tuple):
        return ",".join(str(log_value(each)) for each in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | float | str | None) else str(value)


# --- the secret key
# --------------------------------------------------------------------------------------------------


def secret_keys(settings: Settings) -> list[bytes]:
    """The keys of `secret_key`, or on SQLite those of `{data_dir}/secret.key`, which the first call
    makes.

    The file appears whole and on disk or not at all, and whoever comes second reads the first
    one's. ConfigurationError when it cannot be made or read, when it holds a short key, and when no
    key is given on PostgreSQL.
    """
    if settings.secret_key:
        return keys_of(settings.secret_key.get_secret_value())
    if not settings.sqlite_path:
        raise ConfigurationError(
            f"{PREFIX}SECRET_KEY is required with PostgreSQL: {SECRET_KEY_BYTES} bytes or more,"
            " the same in every process"
        )
    path = settings.key_file
    try:
        if not path.exists():
            make_secret_file(path)
        make_folder(
            path.parent
        )  # also when it was there: whoever made it may have died before it was sure to last
        return keys_of(path.read_text("ascii").strip())
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}; set {PREFIX}SECRET_KEY, or make the folder writable"
        ) from None
    except ValueError:
        raise ConfigurationError(
            f"{path} should hold comma-separated keys of at least {SECRET_KEY_BYTES} bytes each,"
            " in ASCII"
        ) from None


def make_secret_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
        ) as file:
            file.write(secrets.token_urlsafe(48) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # somebody was quicker: theirs counts
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
