"""The program `darkroom` on the PATH of a shell, without the second that its imports take.

The program hands its work to the test, which runs it in a fork of a process with all imports. The
program passes SIGTERM on to it.
"""

import json
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import forked

COMMAND_S = 120
SERVERS = ["serve"], ["worker"], ["sandbox"]  # they run until a signal ends them
SERVE_S = 600
PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
if {whole} and sys.argv[1:2] in {SERVERS}:
    os.execv({python!r}, [{python!r}, "-m", "service", *sys.argv[1:]])
own = f"/proc/{{os.getpid()}}/fd"
work = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
work |= dict(stdout=own + "/1", stderr=own + "/2")
with socket.socket(socket.AF_UNIX) as test:
    test.connect({path!r})
    with test.makefile("rw") as stream:
        print(json.dumps(work), file=stream, flush=True)
        pid = int(stream.readline())
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(pid, number))
        sys.exit(int(stream.readline()))
"""


class Forking(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        work = json.loads(self.rfile.readline())
        folder, out, err = (Path(work[name]) for name in ("folder", "stdout", "stderr"))
        process = forked(work["arguments"], folder, out, err, work["environment"])
        try:
            self.wfile.write(b"%d\n" % process.pid)
            code = process.wait(SERVE_S if work["arguments"][:1] in SERVERS else COMMAND_S)
        finally:
            process.kill()
        self.wfile.write(b"%d\n" % code)


@contextmanager
def quick_program(folder: Path, *, whole: bool = False) -> Iterator[Path]:
    """The folder with the program, for the PATH. With `whole` a command that serves starts like a
    user's, with its imports.
    """
    path = folder / "commands"
    with socketserver.ThreadingUnixStreamServer(str(path), Forking) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        made = folder / "bin" / "darkroom"
        made.parent.mkdir()
        words = {"python": sys.executable, "path": str(path), "whole": whole, "SERVERS": SERVERS}
        made.write_text(PROGRAM.format(**words))
        made.chmod(0o700)
        try:
            yield made.parent
        finally:
            server.shutdown()
