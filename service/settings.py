"""The settings, read once from the environment and `.env`.

A field is the variable of its name in upper case behind DARKROOM_. The text below it is its row in
the table of docs/settings.md. An empty variable counts as unset.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from service import setting_types as types
from service.errors import SettingsError
from service.setting_types import log_value
from service.variables import ENV_FILE, PREFIX, is_setting, tidy, variables_of

# The upstream's limit, without the path: "/callbacks/" 11, an upstream 20, "/" 1, a task 31, "/" 1,
# a token 64.
CALLBACK_URL_CHARS = 2048 - 128
FILES_URL = "https://files-api.evolink.ai"


class Settings(BaseModel):
    """Every setting, checked. `load_settings` makes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=True,
        arbitrary_types_allowed=True,
    )

    host: str = Field("127.0.0.1", pattern=r"^[A-Za-z0-9._:%-]+$")
    """Address to listen on."""
    port: types.Port = 8080
    """Port to listen on. 0 takes any free port."""
    base_url: str = "http://{host}:{port}"
    """The service's own address in links and in the `source` of events."""
    upstream_networks: types.Networks = ()
    """Comma-separated CIDRs outside the public internet that calls to the upstream and downloads of
    results may reach, also with plain http."""
    endpoint_networks: types.Networks = ()
    """The same for deliveries to endpoints."""
    task_callback_networks: types.Networks = ()
    """The same for deliveries to a task's own `callback_url`."""
    callback_url: str | None = None
    """Public https prefix under which the upstream reaches `/callbacks/…`. Without it the service
    sends no `callback_url` and settles tasks by queries alone."""
    data_dir: types.Folder = Path("./data")
    """Directory of the embedded store and of the images. Only the service's user may read it (mode
    0700)."""
    database_url: str = Field("sqlite:///{data_dir}/darkroom.db", repr=False)
    """The store: `sqlite:///FILE` or `postgresql://…` as a provider's console gives it."""
    blob_url: str = "file://{data_dir}/images"
    """Where images are stored: `file:///FOLDER`, or `s3://BUCKET/PREFIX` with the extra `s3` and
    the usual `AWS_…` variables."""
    image_base_url: str | None = None
    """Prefix of image links instead of `{base_url}/images`: a CDN or a public bucket that serves
    the same names."""
    task_id_prefix: Literal["task_", "task-unified-"] = "task_"
    """How the ids of new tasks begin. Some clients of the upstream look for ids of the form
    `task-unified-…` in a response."""
    image_link_ttl_s: Annotated[int, Field(ge=0, le=types.TEN_YEARS_S)] = 0
    """How long a link to an image lives. 0: as long as the image. Otherwise each answer and each
    event has new links, which are signed and expire. A CDN cannot check them, so this needs an
    unset `DARKROOM_IMAGE_BASE_URL`."""
    secret_key: types.SecretKeys | None = None
    """Comma-separated keys of at least 32 bytes. The first key signs and encrypts. All keys verify
    and decrypt."""
    admin_key: types.AdminKey | None = None
    """An API key of the owner `admin` with every scope, for first use. At least 16 characters."""
    evolink_api_key: types.Token | None = None
    """API key of the upstream."""
    evolink_base_url: str = "https://api.evolink.ai"
    """Address of the upstream, with or without `/v1`."""
    evolink_files_url: str | None = None
    """Address of the upstream's file API, by default `https://files-api.evolink.ai`. With another
    `EVOLINK_BASE_URL` the default is that address."""
    evolink_result_hosts: types.Hosts = (".evolink.ai",)
    """Comma-separated hosts from which results may be downloaded. `.x` is every subdomain of x. `x`
    is exactly x. Results on other hosts wait while their links live."""
    evolink_confirm: Annotated[Literal["always", "never"], types.Lower] = "always"
    """`always`: the service believes a callback only when a query agrees. `never`: the token in the
    callback's URL is enough."""
    evolink_concurrency: types.Slots = 16
    """Concurrent calls to the upstream."""
    evolink_task_ttl_s: types.Seconds = 86400
    """How long the upstream keeps a task."""
    evolink_result_ttl_s: types.Seconds = 86400
    """How long the link of a result lives at the upstream."""
    submit_timeout_s: Annotated[float, Field(gt=0, le=1500, allow_inf_nan=False)] = 60
    """Timeout of one submission call."""
    submit_schedule: types.Schedule = (1, 2, 5, 15, 30, 60)
    """Waits between submission calls when nothing was created. The last wait repeats."""
    submit_give_up_s: types.Seconds = 3600
    """After this time a task that could not be submitted fails with `not_submitted`."""
    uncertain: Annotated[Literal["fail", "resubmit"], types.Lower] = "fail"
    """Decision on a submission whose outcome stays unproved: `fail`, or `resubmit` under the same
    idempotency key."""
    uncertain_after_s: types.Seconds = 900
    """How long a callback may still prove the outcome of a submission."""
    query_timeout_s: types.Seconds = 15
    """Timeout of one query call."""
    reconcile_after_s: types.Seconds | None = None
    """Silence before a task's first query. Later waits grow from it, else from 60 s, to 15 min.
    Without a callback URL it is `max(3, estimated_time / 2)`, and they grow from 5 to 60 s."""
    no_results_after_s: types.Seconds = 600
    """How long a completed task without all of its results is asked for again, after waits of 1 s
    growing to 60 s."""
    download_schedule: types.Schedule = (1, 2, 5, 15, 60, 300, 900)
    """Waits between attempts of a download. The last wait repeats."""
    download_concurrency: types.Slots = 16
    """Concurrent downloads."""
    decode_concurrency: types.Slots = Field(default_factory=types.spare_cores)
    """Images decoded at once. Each takes up to 24 bytes a pixel and three times its file size."""
    max_image_bytes: int = Field(52_428_800, ge=1024)
    """Largest result that the service stores, in bytes."""
    max_image_pixels: int = Field(67_108_864, ge=1024)
    """Largest result that the service stores, in pixels."""
    delivery_schedule: types.Schedule = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    """Waits before each retry of a delivery. Each wait is extended by 0 to 20 %."""
    delivery_timeout_s: types.Seconds = 15
    """Timeout of one delivery attempt."""
    endpoint_disable_after_s: types.Seconds = 432_000
    """The service disables an endpoint whose attempts have only failed for this long."""
    max_endpoints: int = Field(100, ge=1)
    """Endpoints that one owner may have. More are 422."""
    sinks: types.Sinks = ()
    """Comma-separated addresses of brokers that get every event, such as
    `nats://HOST:4222/SUBJECT?stream=NAME`. Needs the extra `brokers`."""
    retention_days: types.Days = 30
    """How long the service keeps events, callbacks, deliveries and prompts."""
    image_retention_days: types.Days | None = None
    """How long the service keeps images. Links then answer 410. Unset keeps them forever."""
    audit_retention_days: types.Days = 365
    """How long the service keeps the [audit](operations.md#audit) of operators' acts."""
    file_retention_days: types.Days = 7
    """How long the service keeps input images."""
    min_free_bytes: int = Field(1_073_741_824, ge=0)
    """Below this free disk space new submissions get 503. Callbacks never do."""
    key_requests: types.Requests | None = None
    """Requests that one API key may send to each process, such as `600/minute`. Needs the extra
    `limits`. Unset means no limit."""
    key_waits: Annotated[int, Field(ge=1)] = 100
    """Long polls, and streams, that one API key may have at once in each process. More get 429."""
    log_format: Annotated[Literal["json", "console"], types.Lower] = "json"
    """`json`, or `console` for people."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], types.Lower] = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_prompts: bool = False
    """Whether log lines may contain prompts."""
    metrics_port: types.Port | None = None
    """Port that serves `/metrics` without a key. On the main port `/metrics` needs a key with
    `admin`."""
    stop_s: types.Seconds = 20
    """After SIGTERM, how long requests and work in flight may still take."""
    migrate: Annotated[Literal["on", "off"], types.Lower] = "on"
    """`off`: a start stops on an old schema instead of migrating it."""
    catalogue: types.Folder | None = None
    """A file that extends and overrides the catalogue of models. See
    [Catalogue](catalogue.md#the-operators-file)."""
    unpriced: Annotated[Literal["refuse", "allow"], types.Lower] = "refuse"
    """Whether tasks without a price are accepted under a [budget](money.md#budgets)."""
    console: Annotated[Literal["on", "off"], types.Lower] = "on"
    """`off`: the process serves no [console](console.md)."""
    url: str = "http://127.0.0.1:8080"
    """For client commands: the address of the service."""
    api_key: types.Token | None = None
    """For client commands: the key that they send."""

    @field_validator(
        "base_url", "url", "evolink_base_url", "evolink_files_url", "callback_url", "image_base_url"
    )
    @classmethod
    def _check_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        host, port = info.data.get("host", "localhost"), info.data.get("port", 0)
        value = value.replace("{host}", f"[{host}]" if ":" in host else host)
        value = value.replace("{port}", str(port)).rstrip("/")
        if info.field_name in ("url", "evolink_base_url"):
            value = types.API_PATH.sub("", value)  # every path that is appended begins with it
        parts = types.http_address(value)
        if info.field_name in ("evolink_base_url", "evolink_files_url", "callback_url"):
            own = info.field_name != "callback_url"
            types.check_reachable(parts, info.data.get("upstream_networks", ()), own_resolver=own)
        if info.field_name == "callback_url" and len(value) > CALLBACK_URL_CHARS:
            raise ValueError(f"should have at most {CALLBACK_URL_CHARS} characters")
        return value

    @field_validator("database_url", "blob_url")
    @classmethod
    def _check_url(cls, value: str, info: ValidationInfo) -> str:
        value = value.replace("{data_dir}", str(info.data.get("data_dir", "/")))
        if info.field_name == "blob_url":
            if not value.startswith("file:///") and not types.BUCKET.fullmatch(value):
                raise ValueError("should be file:// and an absolute path, or s3://BUCKET/PREFIX")
        elif not value.startswith("sqlite:"):
            types.check_postgres_url(value)
        elif not re.fullmatch(r"sqlite:///[^:?][^?]*", value):
            raise ValueError("should be sqlite:///FILE, a file and no options")
        return value

    @field_validator("image_link_ttl_s")
    @classmethod
    def _check_link_ttl(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("image_base_url"):
            raise ValueError(f"should be 0 with {PREFIX}IMAGE_BASE_URL, whose links are not signed")
        return value

    @field_validator("metrics_port")
    @classmethod
    def _check_metrics_port(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and value == info.data.get("port"):
            raise ValueError(f"should differ from {PREFIX}PORT")
        return value

    @property
    def files_url(self) -> str:
        if self.evolink_files_url is not None:
            return self.evolink_files_url
        default = type(self).model_fields["evolink_base_url"].default
        return FILES_URL if self.evolink_base_url == default else self.evolink_base_url

    @property
    def sqlite_path(self) -> Path | None:
        """The embedded store's file, or None on PostgreSQL."""
        scheme, _, path = self.database_url.partition(":///")
        return Path(path) if scheme == "sqlite" else None

    @property
    def key_file(self) -> Path:
        """The file of the embedded store's key if `secret_key` is not set."""
        return self.data_dir / "secret.key"

    @property
    def image_dir(self) -> Path:
        """The folder of `blob_url`. With S3 it is the folder of downloads on their way there."""
        scheme, _, path = self.blob_url.partition("://")
        return Path(path) if scheme == "file" else self.data_dir / "incoming"


def load_settings(
    environ: Mapping[str, str] | None = None, env_file: Path | None = ENV_FILE, **overrides: Any
) -> Settings:
    """The settings from `.env`, then the environment, then `overrides` by field name. The last
    value of a setting wins.

    SettingsError names every unknown or wrong variable and its limit, never a value.
    """
    values: dict[str, Any] = {}
    for source in (variables_of(env_file), os.environ if environ is None else environ):
        values |= {name: source[name] for name in source if is_setting(name, source[name])}
    variables = {PREFIX + field.upper(): field for field in Settings.model_fields}
    for name in sorted(values):
        if name not in variables:
            near = difflib.get_close_matches(name[len(PREFIX) :].lower(), variables.values(), 1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            raise SettingsError({name: f"{name} is not a setting{hint}"})
        if values[name] is None:
            raise SettingsError({name: f"{name} has no value in {env_file}: write {name}=…"})
    tidied = {variables[name]: tidy(name, value) for name, value in values.items()}
    fields = {field: value for field, value in tidied.items() if value != ""}
    try:
        return Settings(**fields | overrides)
    except ValidationError as error:
        complaints = dict[str, str]()
        for each in error.errors(include_input=False):
            name, line = complaint(each)
            complaints[name] = f"{complaints[name]}; {line}" if name in complaints else line
        raise SettingsError(complaints) from None


def complaint(error: ErrorDetails) -> tuple[str, str]:
    """The variable, and the line about it."""
    field, *index = error["loc"]
    name = f"{PREFIX}{str(field).upper()}"
    words = error["msg"].removeprefix("Input ")
    if error["type"] == "value_error":
        words = str(error["ctx"]["error"])
    item = f"item {int(index[0]) + 1} " if index else ""
    return name, f"{name}: {item}{words}"


def masked(settings: Settings) -> dict[str, Any]:
    """Every setting by its field as a JSON value for the log, without secrets and passwords."""
    shown = {name: log_value(value) for name, value in settings}
    if not settings.sqlite_path:
        parts = urlsplit(settings.database_url)
        login = "***@" if "@" in parts.netloc else ""
        hosts = parts.netloc.rpartition("@")[2]
        shown["database_url"] = f"postgresql://{login}{hosts}{parts.path}"
    return shown
