"""The public keys of an endpoint's webhooks, as a JSON Web Key Set (RFC 7517 and 8037)."""

import base64
import hashlib
from typing import Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.strict_json import JSON
from service.web.context import resources_of

FRESH = {"cache-control": "public, max-age=3600"}


class PublicKey(BaseModel):
    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    use: Literal["sig"]
    alg: Literal["EdDSA"]
    kid: str
    x: str = Field(description="the key in base64url")
    public_key: str = Field(description="the same key as `whpk_…`, as Standard Webhooks writes it")


class PublicKeys(BaseModel):
    """The first key signs `v1a`. The others did, or will, during a rotation."""

    keys: list[PublicKey]


def document(key: bytes) -> JSON:
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "use": "sig",
        "alg": "EdDSA",
        "kid": hashlib.sha256(key).hexdigest()[:16],
        "x": base64.urlsafe_b64encode(key).decode("ascii").rstrip("="),
        "public_key": "whpk_" + base64.b64encode(key).decode("ascii"),
    }


async def public_keys(request: Request) -> Response:
    """Show the public keys that verify an endpoint's webhooks."""
    keys = resources_of(request).keyring.public_keys(request.path_params["endpoint_id"])
    return JSONResponse({"keys": [document(key) for key in keys]}, headers=FRESH)
