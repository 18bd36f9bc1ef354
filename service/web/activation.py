"""Socket activation and notification of systemd: sd_listen_fds(3), sd_notify(3).

An inherited socket outlives the process. While no process serves, connections wait in its queue,
and the next process answers them.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

from service.errors import ConfigurationError

FIRST = 3  # the descriptor, by the protocol
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def inherited(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The inherited socket, or None. Raises ConfigurationError if the descriptor is no listening
    socket.

    The variables leave `environ`, because they are meant for this process and not for its children.
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
    handed = f"descriptor {FIRST}, handed over by LISTEN_FDS,"
    try:
        bound = socket.socket(fileno=FIRST)
    except OSError as error:
        raise ConfigurationError(f"{handed} is no socket: {error.strerror}") from error
    listens = bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or bound.type != socket.SOCK_STREAM or bound.family not in FAMILIES:
        bound.close()
        raise ConfigurationError(f"{handed} is no listening stream socket (Accept=no)")
    bound.set_inheritable(False)
    bound.setblocking(False)
    return bound


def notify(state: str) -> None:
    """Sends `READY=1` or `STOPPING=1` to the supervisor, if it asked for it (`Type=notify`)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor, suppress(OSError):
            path = f"\0{address[1:]}" if address.startswith("@") else address
            supervisor.sendto(state.encode(), path)
