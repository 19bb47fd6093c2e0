"""Every error a caller can see: one tree, each with its status, its code and who failed.

GatewayError
├── InvalidRequest 400        the request itself is wrong; `param` names the field
│   └── PromptRefused 400     one prompt cannot be served; the others of its batch can
├── Unauthorized 401, Forbidden 403
├── NotFound 404
│   └── RouteNotServed 404    the engine has no such route for the model that it serves
├── MethodNotAllowed 405
├── BodyTimeout 408
├── Conflict 409              what is asked does not go with the state that something is in
├── PayloadTooLarge 413
├── UnsupportedMediaType 415  the body is no JSON
├── RateLimited 429           a key's allowance is used up
│   └── BudgetUsedUp 429      that of its day or month
├── Overloaded 429            too much is waiting already
├── DeadlinePassed 504        the request's own deadline came before its answer
├── DeadlineUnreachable 503   the request's own deadline cannot be met
├── Unavailable 503           no engine is ready: warming, restarting, draining
│   ├── EngineBusy 503        the engine has too much to do already
│   ├── LimitsAway 503        nobody can say what the key has left
│   ├── OutOfFiles 503        the gateway itself may open no more connections
│   └── StorageUnavailable 503  the disk or the database of what is kept does not answer
├── StorageFull 507           there is no room left for what is kept
└── EngineError 502           the engine failed
    ├── EngineUnreachable 503 it did not accept the request, which therefore did not run
    ├── EngineAborted 502     it gave a sequence up
    └── EngineTimeout 504
"""

from __future__ import annotations

from typing import ClassVar, Literal

Source = Literal["gateway", "engine"]

# Codes of what is turned away before an engine sees it: who asks, how much, or at what time.
REFUSALS = (
    "missing_key",
    "invalid_api_key",
    "route_not_allowed",
    "model_not_allowed",
    "constraint_not_allowed",
    "not_admin",
    "host_not_allowed",
    "cross_site",
    "body_too_large",
    "too_many_bodies",
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_month",
    "key_concurrency",
    "limits_away",
    "overloaded",
    "queue_timeout",
    "deadline_unreachable",
    "not_ready",
)


_LONGEST_RETRY_AFTER_S = 60.0


class GatewayError(Exception):
    """What a handler raises and the middleware turns into OpenAI's envelope."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "api_error"
    code: ClassVar[str] = "internal_error"
    source: ClassVar[Source] = "gateway"
    # Sent again it would fail again, or only do again what was too much at once.
    is_final: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_s = retry_after_s

    @property
    def is_not_for_retry(self) -> bool:
        """Clients of OpenAI's come again within seconds if they are told a longer time."""
        is_own_fault = type(self) is GatewayError
        is_long = (self.retry_after_s or 0) > _LONGEST_RETRY_AFTER_S
        return self.is_final or is_own_fault or is_long


class InvalidRequest(GatewayError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class PromptRefused(InvalidRequest):
    code = "prompt_refused"


class Unauthorized(GatewayError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(GatewayError):
    status = 403
    kind = "permission_error"
    code = "forbidden"


class RateLimited(GatewayError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limited"


class NotFound(GatewayError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class RouteNotServed(NotFound):
    """What an engine serves depends on its model; that is no failure of its own."""

    code = "route_not_served"
    source = "engine"


class MethodNotAllowed(GatewayError):
    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeout(GatewayError):
    status = 408
    kind = "invalid_request_error"
    code = "body_timeout"


class Conflict(GatewayError):
    status = 409
    kind = "invalid_request_error"
    code = "conflict"


class PayloadTooLarge(GatewayError):
    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaType(GatewayError):
    status = 415
    kind = "invalid_request_error"
    code = "unsupported_media_type"


class BudgetUsedUp(RateLimited):
    """Until the next day or month."""

    code = "tokens_per_day"
    is_final = True


class Overloaded(GatewayError):
    status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class DeadlineUnreachable(GatewayError):
    status = 503
    kind = "service_unavailable"
    code = "deadline_unreachable"


class DeadlinePassed(GatewayError):
    status = 504
    kind = "service_unavailable"
    code = "deadline_passed"
    is_final = True


class Unavailable(GatewayError):
    status = 503
    kind = "service_unavailable"
    code = "not_ready"


class EngineBusy(Unavailable):
    code = "engine_busy"


class LimitsAway(Unavailable):
    """Where all gateways keep them does not answer, and the operator wants nothing let in then."""

    code = "limits_away"


class OutOfFiles(Unavailable):
    """The gateway's own shortage: the engine is not to blame."""

    code = "out_of_files"


class StorageUnavailable(Unavailable):
    """Of what is kept; everything else is served as ever."""

    code = "storage_unavailable"


class StorageFull(GatewayError):
    status = 507
    code = "storage_full"


class EngineError(GatewayError):
    status = 502
    code = "engine_failed"
    source = "engine"


class EngineUnreachable(EngineError):
    status = 503
    code = "engine_unreachable"


class EngineAborted(EngineError):
    code = "engine_aborted"


class EngineTimeout(EngineError):
    status = 504
    code = "engine_timeout"
    is_final = True
