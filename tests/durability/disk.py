"""Works out from a trace what a disk is sure to hold. It counts only what POSIX guarantees, not
what a file system does beyond that.

Data of a file is durable when an fsync or fdatasync that began after the write is done. A name is
durable when such a sync of its folder is done. In between, each write and each name may be kept or
lost, and a coin decides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from tests.durability.trace import SYNCS, Call, Moment

Coin = Callable[[], bool]  # whether the disk keeps an unsynced change


def lost() -> bool:
    return False


def kept() -> bool:
    return True


@dataclass(eq=False, slots=True)
class File:
    """`safe` is on the disk. `pending` has the later changes as (when, offset, data). Data of None
    means that the file was truncated there.
    """

    safe: bytearray = field(default_factory=bytearray)
    size: int = 0
    pending: list[tuple[int, int, bytes | None]] = field(default_factory=list)

    def content(self, coin: Coin) -> bytes:
        content = bytearray(self.safe)
        for _, offset, data in self.pending:
            if coin():
                apply(content, offset, data)
        return bytes(content)

    def sync(self, until: int) -> None:
        for at, offset, data in self.pending:
            if at <= until:
                apply(self.safe, offset, data)
        self.pending = [step for step in self.pending if step[0] > until]


@dataclass(eq=False, slots=True)
class Folder:
    """The names as programs see them, and as the disk has them. `synced` is the time of the last
    sync.
    """

    live: dict[str, "Node"] = field(default_factory=dict)
    safe: dict[str, "Node"] = field(default_factory=dict)
    synced: int = 0

    def names(self, coin: Coin) -> dict[str, "Node"]:
        chosen = {}
        for name in sorted(self.live.keys() | self.safe.keys()):
            node = self.live.get(name) if coin() else self.safe.get(name)
            if node is not None:
                chosen[name] = node
        return chosen


Node = Union[File, Folder]  # noqa: UP007 - named before both are complete


def apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


class Disk:
    """The files below `root`, an existing and durable folder. The files already in it are durable
    too if they are `trusted`.
    """

    def __init__(self, root: Path, *, trusted: bool = True) -> None:
        self.root = str(root)
        self.top = loaded(root, trusted=trusted)
        self.time = 0  # the number of changes so far
        self.syncs = 0  # the number of finished syncs
        self._under_way: dict[
            int, tuple[int, list[tuple[Folder, dict[str, Node]]], list[File]]
        ] = {}

    def observe(self, moment: Moment) -> None:
        """Applies a call. An interrupted call counts as done, except a sync."""
        call = moment.call
        if call.name in SYNCS:
            if moment.done:
                self._synced(call)
            else:
                self._under_way[id(call)] = self._covered(call)
        elif moment.done and not call.failed and self._change(call):
            self.time += 1

    # --- calls that make changes durable

    def _covered(self, call: Call) -> tuple[int, list[tuple[Folder, dict[str, Node]]], list[File]]:
        nodes = (
            list(walked(self.top)) if call.name in ("sync", "syncfs") else [self.find(call.path)]
        )
        folders = [(node, dict(node.live)) for node in nodes if isinstance(node, Folder)]
        return self.time, folders, [node for node in nodes if isinstance(node, File)]

    def _synced(self, call: Call) -> None:
        until, folders, files = self._under_way.pop(id(call))
        if call.failed or call.cut:
            return
        for folder, names in folders:
            if folder.synced <= until:
                folder.safe, folder.synced = names, until
        for file in files:
            file.sync(until)
        self.syncs += bool(folders or files)

    # --- calls that change the disk

    def _change(self, call: Call) -> bool:
        inside = [path for path in (call.path, call.other) if path.startswith(self.root + "/")]
        if not inside:
            return False
        match call.name:
            case "open" | "openat" | "creat":
                self._open(call)
            case "write" | "writev":
                self._write(call.path, None, call.data)
            case "pwrite64":
                self._write(call.path, call.numbers[-1], call.data)
            case "ftruncate" | "truncate":
                self._write(call.path, call.numbers[-1], None)
            case "rename" | "renameat" | "renameat2":
                there, name = self._place(call.other)
                from_, old = self._place(call.path)
                there[name] = from_.pop(old)
            case "link" | "linkat":
                there, name = self._place(call.other)
                from_, old = self._place(call.path)
                there[name] = from_[old]
            case "unlink" | "unlinkat" | "rmdir":
                place, name = self._place(call.path)
                del place[name]
            case "mkdir" | "mkdirat":
                place, name = self._place(call.path)
                place[name] = Folder()
            case _:
                raise AssertionError(f"the model does not know what {call.name} does to {inside}")
        return True

    def _open(self, call: Call) -> None:
        place, name = self._place(call.path)
        if "O_CREAT" in call.flags and name not in place:
            place[name] = File()
        if "O_TRUNC" in call.flags:
            self._write(call.path, 0, None)

    def _write(self, path: str, offset: int | None, data: bytes | None) -> None:
        """An `offset` of None means the end of the file, where a write without one goes."""
        file = self.find(path)
        if file is None:  # removed while open
            return
        assert isinstance(file, File), path
        at = file.size if offset is None else offset
        file.pending.append((self.time + 1, at, data))
        file.size = at if data is None else max(file.size, at + len(data))

    def _place(self, path: str) -> tuple[dict[str, Node], str]:
        above, _, name = path.rpartition("/")
        folder = self.find(above)
        assert isinstance(folder, Folder), path
        return folder.live, name

    def find(self, path: str) -> Node | None:
        """What programs find there."""
        if path != self.root and not path.startswith(self.root + "/"):
            return None
        node: Node | None = self.top
        for name in path.removeprefix(self.root).split("/")[1:]:
            node = node.live.get(name) if isinstance(node, Folder) else None
        return node

    # --- the files after a power cut

    def left(self, coin: Coin = lost, below: str = "") -> dict[str, bytes]:
        """The files by their path below the root. `below` selects the paths that begin with it."""
        return {
            path: node.content(coin)
            for path, node in listed(self.top, coin)
            if isinstance(node, File) and path.startswith(below)
        }

    def lay(self, target: Path, coin: Coin = lost) -> None:
        """Makes `target` a copy of the root after a power cut."""
        target.mkdir()
        for path, node in listed(self.top, coin):
            if isinstance(node, Folder):
                (target / path).mkdir()
            else:
                (target / path).write_bytes(node.content(coin))


def loaded(path: Path, *, trusted: bool) -> Folder:
    folder = Folder()
    for entry in path.iterdir():
        if entry.is_dir():
            folder.live[entry.name] = loaded(entry, trusted=trusted)
        else:
            content = entry.read_bytes()
            pending: list[tuple[int, int, bytes | None]] = [] if trusted else [(0, 0, content)]
            folder.live[entry.name] = File(
                bytearray(content if trusted else b""), len(content), pending
            )
    folder.safe = dict(folder.live) if trusted else {}
    return folder


def listed(folder: Folder, coin: Coin, above: str = "") -> Iterator[tuple[str, Node]]:
    for name, node in folder.names(coin).items():
        yield above + name, node
        if isinstance(node, Folder):
            yield from listed(node, coin, f"{above}{name}/")


def walked(folder: Folder) -> Iterator[Node]:
    yield folder
    for node in {*folder.live.values(), *folder.safe.values()}:
        if isinstance(node, Folder):
            yield from walked(node)
        else:
            yield node
