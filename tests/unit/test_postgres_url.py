"""`DARKROOM_DATABASE_URL` as providers' consoles and other programs write it."""

import pytest

from service.db.postgres_url import parse_postgres_url
from service.errors import ConfigurationError
from service.settings import load_settings, masked

HOST = "ep-cool-1.eu-central-1.aws.neon.tech"
CONSOLES = {
    "Neon": f"postgresql://o:p@{HOST}/neondb?sslmode=require&channel_binding=require",
    "Neon for old clients": f"postgres://o:p@{HOST}/neondb?options=endpoint%3Dep-cool-1",
    "Supabase": "postgresql://postgres.abc:p@aws-0.pooler.supabase.com:5432/postgres",
    "Heroku": "postgres://u:p@ec2-1.compute-1.amazonaws.com:5432/d1",
    "RDS": "postgresql://u:p@x.rds.amazonaws.com/d?sslmode=verify-full&sslrootcert=/rds.pem",
    "Render": "postgres://u:p@dpg-1-a.oregon-postgres.render.com/d",
    "DigitalOcean": "postgresql://doadmin:p@db-1.ondigitalocean.com:25060/defaultdb?sslmode=require",
    "Azure": "postgres://u%40srv:p@srv.postgres.database.azure.com:5432/d?sslmode=require",
    "Cloud SQL": "postgresql://u:p@/d?host=/cloudsql/project:region:instance",
    "Crunchy": "postgres://u:p@p.x.db.postgresbridge.com:5432/d?ssl=true",
    "Cockroach": "postgresql://u:p@x.cockroachlabs.cloud:26257/d?sslmode=verify-full&sslrootcert=system",
    "JDBC's ssl": "postgres://u:p@db/d?ssl=true&sslmode=verify-ca",
    "SQLAlchemy": "postgresql+asyncpg://u:p@db/d",
    "Django": "postgresql+psycopg2://u:p@db/d?connect_timeout=10&keepalives_idle=30",
    "several hosts": "postgresql://u:p@one:5432,two:5433/d?target_session_attrs=read-write",
    "libpq's hosts": "postgresql:///d?host=one,two&port=5432,5433&user=u&password=p",
    "capitals": "POSTGRES://u:p@db/d",
    "quotes and a line end": '"postgres://u:p@db/d?sslmode=require"\n',
}


def loaded(url: str) -> str:
    return load_settings({"DARKROOM_DATABASE_URL": url}, None).database_url


@pytest.mark.parametrize("url", CONSOLES.values(), ids=CONSOLES)
def test_an_address_from_a_console_is_taken(url: str) -> None:
    """Every address of a provider can be pasted as it is. The log does not show its login."""
    for dsn in parse_postgres_url(loaded(url)).dsns:
        assert dsn.startswith("postgresql://")
    shown = masked(load_settings({"DARKROOM_DATABASE_URL": url}, None))["database_url"]
    assert shown.startswith("postgresql://")
    assert ":p@" not in shown


@pytest.mark.parametrize(
    ("url", "dsns"),
    [
        ("postgres://u:p%40ss@db:5432/d", ["postgresql://u:p%40ss@db:5432/d"]),
        ("postgresql:///d?host=/run/pg&user=u", ["postgresql:///d?host=/run/pg&user=u"]),
        (
            "postgresql://u@one:1,two:2/d?sslmode=require",
            ["postgresql://u@one:1/d?sslmode=require", "postgresql://u@two:2/d?sslmode=require"],
        ),
        (
            "postgresql:///d?host=one,two&port=1,2&user=u",
            ["postgresql:///d?host=one&port=1&user=u", "postgresql:///d?host=two&port=2&user=u"],
        ),
        ("postgresql://[::1]:5433/d", ["postgresql://[::1]:5433/d"]),
        ("postgresql:///d?hostaddr=10.0.0.1", ["postgresql:///d?host=10.0.0.1"]),
        ("postgres://u@db/d?ssl=true", ["postgresql://u@db/d?sslmode=require"]),
        ("postgres://u@db/d?ssl=true&sslmode=disable", ["postgresql://u@db/d?sslmode=disable"]),
        (
            "postgres://u@db/d?channel_binding=require&connect_timeout=5&options=-c%20geqo%3Doff",
            ["postgresql://u@db/d?options=-c+geqo%3Doff"],
        ),
    ],
)
def test_the_driver_gets_one_address_for_each_host(url: str, dsns: list[str]) -> None:
    """It has only the parameters that the driver reads."""
    assert list(parse_postgres_url(url).dsns) == dsns


def test_parameters_of_the_service_are_kept_as_numbers() -> None:
    """The rest of libpq's parameters are listed as ignored."""
    parsed = parse_postgres_url(
        "postgres://db/d?connect_timeout=10&keepalives=1&keepalives_idle=30&tcp_user_timeout=9000"
        "&channel_binding=require&gssencmode=disable&application_name=x&sslcert=/a&sslkey=/b"
    )
    assert parsed.numbers == {
        "connect_timeout": 10,
        "keepalives": 1,
        "keepalives_idle": 30,
        "tcp_user_timeout": 9000,
    }
    assert parsed.ignored == ("application_name", "channel_binding", "gssencmode")
    assert parsed.files == {"sslcert": "/a", "sslkey": "/b"}


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("pgbouncer=true", "pgbouncer"),
        ("sslmode=require&pgbouncer=true&connection_limit=1", "connection_limit, pgbouncer"),
        ("supa=base-pooler.x", "supa"),
        ("schema=public", "schema"),
        ("currentSchema=public", "currentSchema"),
        ("sslaccept=strict", "sslaccept"),
        ("ssl=1", "ssl"),
        ("uselibpqcompat=true", "uselibpqcompat"),
        ("statement_timeout=5000", "statement_timeout"),
        ("pool_mode=transaction", "pool_mode"),
        ("prepareThreshold=0", "prepareThreshold"),
        ("SSLMODE=require", "SSLMODE"),
        ("sslmode=no-verify", "sslmode"),
        ("sslmode=", None),
        ("sslnegotiation=maybe", "sslnegotiation"),
        ("sslrootcert=system&sslmode=require", "sslrootcert"),
        ("connect_timeout=10s", "connect_timeout"),
        ("keepalives_idle=1.5", "keepalives_idle"),
        ("host=one,two&port=1,2,3", "port"),
        ("host=one&port=x", "port"),
        ("pa55%0aword=pa55", "odd characters"),
    ],
)
def test_a_foreign_parameter_is_refused_by_name(query: str, named: str | None) -> None:
    """The start stops with one line. The line has no value."""
    url = f"postgresql:///d?{query}&password=pa55"
    if named is None:
        assert loaded(url)
        return
    with pytest.raises(ConfigurationError) as caught:
        loaded(url)
    said = str(caught.value)
    assert said.startswith("DARKROOM_DATABASE_URL: ")
    assert named in said
    assert "\n" not in said
    assert "pa55" not in said
