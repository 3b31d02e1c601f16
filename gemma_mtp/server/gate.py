"""What every request passes before anything reads it: the API key and the size of the body."""

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_mtp.server.errors import ApiError
from gemma_mtp.server.page import PATHS

OPEN = ("/health", *PATHS)  # no key is asked for
CLIENT = "gemma_mtp.client"  # whose a request is, in its scope: its API key, or else the address it comes from


class Gate:
    """An ASGI middleware. keys: those that are let in; none: everyone is. max_body: bytes."""

    def __init__(self, app: ASGIApp, keys: Collection[str], max_body: int):
        self._app, self._max_body = app, max_body
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            scope[CLIENT] = scope["client"][0] if scope["client"] else ""
            if self._keys and scope["path"] not in OPEN:
                scope[CLIENT] = self._check_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        waiting = [body] if body else []

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

    def _check_key(self, headers: Headers) -> str:
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            message = "An API key is needed: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'."
            raise ApiError(401, message, code="missing_api_key")
        # All keys are compared, each in constant time, so that the time tells nothing of them.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if not any(matches):
            raise ApiError(401, "The API key is not one that this server knows.", code="invalid_api_key")
        return given.strip()

    async def _body(self, headers: Headers, receive: Receive) -> Message | None:
        """The whole body as one message; None when the client left before its end."""
        said = headers.get("content-length", "0")
        if said.isdecimal() and int(said) > self._max_body:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._max_body:
                raise self._too_large()
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    def _too_large(self) -> ApiError:
        message = f"The body is larger than the {self._max_body} bytes that this server takes."
        return ApiError(413, message, code="request_too_large")
