"""Kinds of failure (transient, credentials, missing), whichever client raised the error."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Literal

Fault = Literal["passing", "expired", "denied", "missing", "other"]

_PASSING = {
    *("408", "409", "429", "500", "502", "503", "504"),
    *("ConditionalRequestConflict", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable"),
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
}
_MISSING = {"404", "NoSuchBucket", "NoSuchKey"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
# By class name, so that botocore is not imported where it is not needed.
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "NoAuthTokenError"),
}
# What these packages raise without a code is a failed request.
_CLIENTS = {
    *("aiobotocore", "aiohttp", "botocore", "http", "httpcore", "httpx", "httpx2", "huggingface_hub", "obstore"),
    *("requests", "ssl", "urllib3"),
}


class ShortRead(Exception):
    """Fewer bytes came than were asked for."""


class Replaced(Exception):
    """Another object took the name of the one that was being read in parts."""


def fault_of(error: BaseException) -> Fault:
    """What kind of failure `error`, as some client raised it, is."""
    codes: set[str] = set()
    kinds: list[BaseException] = list(_chain(error))
    for each in kinds:
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        elif response is not None:
            codes.add(str(getattr(response, "status_code", None)))
        elif type(each).__module__.startswith("obstore"):
            # obstore puts the answer into its message.
            codes |= set(re.findall(r"<Code>(\w+)</Code>", str(each)))
            codes |= set(re.findall(r"status(?: code)?:? (\d{3})", str(each), re.IGNORECASE))
    if codes & _EXPIRED:
        return "expired"
    if codes & _MISSING or any(isinstance(each, FileNotFoundError) for each in kinds):
        return "missing"
    if codes & _PASSING:
        return "passing"
    names = {type(each).__name__ for each in kinds}
    if codes & _DENIED or names & (_NO_CREDENTIALS | {"PermissionDeniedError", "UnauthenticatedError"}):
        return "denied"
    if any(isinstance(each, PermissionError) for each in kinds):
        return "denied"
    passing = (
        ConnectionError,
        TimeoutError,
        asyncio.TimeoutError,
        asyncio.IncompleteReadError,
        EOFError,
        ShortRead,
        Replaced,
    )
    if any(isinstance(each, passing) or type(each).__module__.partition(".")[0] in _CLIENTS for each in kinds):
        return "passing"
    return "other"


def detail(error: Exception) -> str:
    """The message of the server or the client, on one line."""
    for each in _chain(error):
        if isinstance(response := getattr(each, "response", None), dict):
            answer = response.get("Error", {})
            return f"{answer.get('Code')} {answer.get('Message', '')}".strip()
    # obstore appends its internal structures.
    text = " ".join(str(error).partition("Debug source:")[0].split()) or type(error).__name__
    answered = re.search(r"<Code>(.*?)</Code>.*?(?:<Message>(.*?)</Message>|$)", text)
    return " ".join(filter(None, answered.groups())) if answered else text[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
