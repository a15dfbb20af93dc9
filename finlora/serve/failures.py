"""HTTP status and OpenAI error body of every exception, from one table."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from finlora.errors import (
    AdapterError,
    ApprovalError,
    ConfigError,
    DatasetError,
    FinloraError,
    ModelError,
    QueueFullError,
    QuotaError,
    StageLostError,
)
from finlora.serve.protocol import ErrorBody, ErrorResponse

# Error -> status, OpenAI's type, code, seconds to wait before a retry (0: no retry). The first match counts.
_TABLE: tuple[tuple[type[FinloraError], int, str, str, int], ...] = (
    (QuotaError, 429, "rate_limit_error", "rate_limit_exceeded", 1),
    (QueueFullError, 429, "rate_limit_error", "queue_full", 1),
    (StageLostError, 503, "service_unavailable_error", "stage_lost", 5),
    (ApprovalError, 422, "invalid_request_error", "adapter_not_approved", 0),
    (AdapterError, 422, "invalid_request_error", "adapter_refused", 0),
    (ModelError, 422, "invalid_request_error", "model_refused", 0),
    (ConfigError, 400, "invalid_request_error", "invalid_value", 0),
    (DatasetError, 400, "invalid_request_error", "invalid_value", 0),
)
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
HTTP_CODES = {404: "unknown_path", 405: "method_not_allowed", 408: "slow_body", 413: "too_large"}
"""Status of an error that Starlette raises itself -> code."""


class RefusedError(Exception):
    """Refusal of a request by the HTTP layer itself.

    Args:
        status: HTTP status.
        message: what was found, what was expected, what to do.
        code: error code for programs.
        param: field of the request that is wrong.
        retry_after_s: seconds to wait before a retry; 0: no retry.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


def as_refusal(error: Exception) -> RefusedError:
    """Return the refusal for an error. An error that is not FinLoRA's own reveals nothing of its text."""
    if isinstance(error, RefusedError):
        return error
    for kind, status, _, code, retry_after_s in _TABLE:
        if isinstance(error, kind):
            wait = error.retry_after_s if isinstance(error, QuotaError) else retry_after_s
            return RefusedError(status, str(error), code, retry_after_s=wait)
    return RefusedError(
        500, "the server failed on this request: its log says why, under the request id.", "internal_error"
    )


def error_body(refusal: RefusedError) -> ErrorResponse:
    """Return the error body in OpenAI's form."""
    kinds = {status: kind for _, status, kind, _, _ in _TABLE} | _TYPES
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return ErrorResponse(error=ErrorBody(message=str(refusal), type=kind, param=refusal.param, code=refusal.code))


def error_reply(error: Exception) -> JSONResponse:
    """Return the HTTP response for an error."""
    refusal = as_refusal(error)
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal).model_dump(), refusal.status, headers)


def from_http(error: HTTPException) -> RefusedError:
    """Return Starlette's own errors, such as an unknown path, as refusals."""
    hints = {404: "this path does not exist: see /openapi.json.", 405: "this path takes another method."}
    message = hints.get(error.status_code, str(error.detail))
    return RefusedError(error.status_code, message, HTTP_CODES.get(error.status_code, "http_error"))
