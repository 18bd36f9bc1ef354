"""The sandbox upstream: an emulator of the EvoLink image API, strict, with real images and faults
on demand (contract section 7).

`create_sandbox(SandboxOptions(...))` is an ASGI application with its own lifespan; its state lives
in memory and dies with it.
"""

from service.upstreams.sandbox.emulator import create_sandbox
from service.upstreams.sandbox.faults import FAULTS
from service.upstreams.sandbox.options import SandboxOptions

__all__ = ["FAULTS", "SandboxOptions", "create_sandbox"]
