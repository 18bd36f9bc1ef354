"""The program `darkroom` on the PATH of a shell, without the second that its imports take.

The program hands its work to the test, which runs it in a fork of a process with all imports. A
command that serves starts like a user's.
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
PROGRAM = """#!{python} -SE
import json, os, socket, sys
if sys.argv[1:2] in (["serve"], ["worker"], ["sandbox"]):
    os.execv({python!r}, [{python!r}, "-m", "service", *sys.argv[1:]])
own = f"/proc/{{os.getpid()}}/fd"
work = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
work |= dict(stdout=own + "/1", stderr=own + "/2")
with socket.socket(socket.AF_UNIX) as test:
    test.connect({path!r})
    with test.makefile("rw") as stream:
        print(json.dumps(work), file=stream, flush=True)
        sys.exit(int(stream.readline()))
"""


class Forking(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        work = json.loads(self.rfile.readline())
        folder, out, err = (Path(work[name]) for name in ("folder", "stdout", "stderr"))
        process = forked(work["arguments"], folder, out, err, work["environment"])
        try:
            code = process.wait(COMMAND_S)
        finally:
            process.kill()
        self.wfile.write(b"%d\n" % code)


@contextmanager
def quick_program(folder: Path) -> Iterator[Path]:
    """The folder with the program, for the PATH."""
    path = folder / "commands"
    with socketserver.ThreadingUnixStreamServer(str(path), Forking) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        made = folder / "bin" / "darkroom"
        made.parent.mkdir()
        made.write_text(PROGRAM.format(python=sys.executable, path=str(path)))
        made.chmod(0o700)
        try:
            yield made.parent
        finally:
            server.shutdown()
