"""Errors in OpenAI's form, and in Anthropic's."""

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from gemma_mtp.errors import BusyError, GemmaMtpError, LateError, PromptError, SettingsError


class ApiError(Exception):
    """An answer that is an error: its HTTP status and what OpenAI's error object says."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def content(self) -> dict[str, dict[str, str | None]]:
        kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The same in Anthropic's form."""
        kinds = {404: "not_found_error", 413: "request_too_large", 401: "authentication_error", 503: "overloaded_error"}
        kinds[504] = "timeout_error"
        kind = kinds.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> Response:
        """path: what was asked for, which has the form of its API."""
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # As ASCII: a message may quote a request's lone surrogate, which has no UTF-8.
        if path.startswith("/v1/messages"):
            status = 529 if self.status == 503 else self.status
            return Response(json.dumps(self.anthropic()), status, headers, media_type="application/json")
        return Response(json.dumps(self.content()), self.status, headers, media_type="application/json")


def api_error(error: Exception) -> ApiError:
    """What to answer when `error` was raised. Of a fault of ours the client is told no more than that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="overloaded")
    if isinstance(error, LateError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, (PromptError, SettingsError)):
        too_long = "more than the context" in str(error)
        return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, GemmaMtpError):
        return ApiError(500, str(error))
    return ApiError(500, "The server failed at this request; its log says why.")


def invalid(error: RequestValidationError) -> ApiError:
    """What was wrong with a request's body: the first fault that has a sentence of ours, or the first."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "value_error"), faults[0])
    path = [str(part) for part in fault["loc"] if part != "body"]
    place = ".".join(part for part in path if part.replace(".", "_").isidentifier() or part.isdecimal())
    if fault["type"] == "string_unicode" and not place:
        return ApiError(400, "The name of a parameter has a lone surrogate, which is no character.")
    if fault["type"] == "extra_forbidden":
        place = ".".join(path)
        return ApiError(400, f"The parameter '{place}' is not supported.", param=place, code="unsupported_parameter")
    if fault["type"] == "value_error":  # said by our own validators
        return ApiError(400, str(fault["ctx"]["error"]), param=place or None)
    if fault["type"] == "missing" and place:
        return ApiError(400, f"The parameter '{place}' is missing.", param=place)
    if not place or fault["type"] == "json_invalid":
        return ApiError(400, "The body is not a JSON object: send one, with Content-Type: application/json.")
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return ApiError(400, f"The parameter '{place}' is not valid: {message}.", param=path[0])
