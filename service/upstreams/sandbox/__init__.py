"""The sandbox upstream: a strict emulator of the EvoLink image API with real images and faults on
demand (docs/sandbox.md).

`create_sandbox(SandboxOptions(...))` is an ASGI application. Its state is in memory.
"""

from service.upstreams.sandbox.emulator import create_sandbox
from service.upstreams.sandbox.faults import FAULTS
from service.upstreams.sandbox.options import SandboxOptions

__all__ = ["FAULTS", "SandboxOptions", "create_sandbox"]
