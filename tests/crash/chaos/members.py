"""The service processes that a run kills and pauses."""

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.launcher import Launched, Launcher
from tests.waiting import wait_until

LOOK_S, AGAIN_S, DEAD_S = 0.1, 0.5, 60.0


@dataclass(slots=True)
class Member:
    """One process of the service, which starts again after each exit. Its log is in `folder`.
    `ends` has the codes of the exits that no kill caused.
    """

    launcher: Launcher
    folder: Path
    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    kills: int = 0
    pauses: int = 0
    asleep: bool = False
    ends: list[int] = field(default_factory=list)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _process: Launched | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._process = Launched(self.launcher, self.folder, self.environment, *self.arguments)

    @property
    def process(self) -> Launched:
        assert self._process is not None
        return self._process

    async def keep(self) -> None:
        """Restarts the process after each exit, as an init system does, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            async with self._lock:
                if (code := self.process.code) is not None:
                    self.ends.append(code)
                    await asyncio.sleep(AGAIN_S)
                    self.start()

    async def kill(self, down: float) -> None:
        """Sends SIGKILL at any moment, also during a start, and starts the process again after
        `down` seconds.
        """
        async with self._lock:
            if (code := self.process.code) is not None:
                self.ends.append(code)
                self.start()
            process = self.process
            os.kill(process.pid, signal.SIGKILL)
            self.kills += 1
            await wait_until(lambda: process.code is not None, DEAD_S)
            await asyncio.sleep(down)
            self.start()

    async def pause(self, seconds: float) -> None:
        process = self.process
        if process.code is not None or self.asleep:
            return
        self.asleep = True
        try:
            os.kill(process.pid, signal.SIGSTOP)  # a process that died meanwhile is not reaped yet
            self.pauses += 1
            await asyncio.sleep(seconds)
        finally:
            self.asleep = False
            if process.code is None:
                os.kill(process.pid, signal.SIGCONT)

    def told(self) -> bool:
        return self.ready() or self.process.code is not None

    def ready(self) -> bool:
        return self.process.code is None and "service.started" in self.process.printed
