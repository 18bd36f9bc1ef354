"""The listening socket that systemd hands over, and what systemd is told: sd_listen_fds(3),
sd_notify(3).

The socket outlives the process. While none serves, connections wait in its queue, and the next
process answers them.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

from service.errors import ConfigurationError

FIRST = 3  # the descriptor, by the protocol
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def inherited(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that this process was handed, None: it was handed none; ConfigurationError: nobody
    can be served on what it was handed.

    What says so leaves `environ`: it is meant for this process and for no child.
    """
    count, pid, _ = (
        environ.pop(name, None) for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
    )
    if count is None or pid != str(os.getpid()):
        return None
    if count != "1":
        raise ConfigurationError(
            f"{count} sockets were handed over (LISTEN_FDS), and darkroom listens on one"
        )
    try:
        found = socket.socket(fileno=FIRST)
    except OSError as error:
        raise ConfigurationError(
            f"descriptor {FIRST}, handed over by LISTEN_FDS, is no socket: {error.strerror}"
        ) from error
    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or found.type != socket.SOCK_STREAM or found.family not in FAMILIES:
        found.close()
        raise ConfigurationError(
            f"descriptor {FIRST}, handed over by LISTEN_FDS, is no listening stream socket"
            " (Accept=no)"
        )
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def notify(state: str) -> None:
    """Tells whoever started the process and asked for it, as systemd does for `Type=notify`:
    `READY=1` or `STOPPING=1`.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, suppress(OSError):
            told.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
