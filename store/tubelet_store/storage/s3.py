"""Where S3 is and how to sign requests to it: the environment, a profile or a role, as botocore finds them.

`s3://anon@BUCKET/...` means: without credentials. As part of the URL, it holds in every process.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fsspec.config

if TYPE_CHECKING:
    from botocore.credentials import Credentials

_ANONYMOUS = "anon@"

# Settings of fsspec's `s3` section that obstore can be given; with any other, fsspec reads.
_KNOWN_SETTINGS = {"anon", "endpoint_url", "key", "secret", "token", "profile", "client_kwargs"}
_KNOWN_KEYWORDS = {"endpoint_url", "region_name"}


def is_s3(url: str) -> bool:
    """`url` is of S3's scheme."""
    return url.startswith(("s3://", "s3a://"))


def split_anonymous(url: str) -> tuple[str, bool]:
    """`url` as every S3 client takes it, and whether it is anonymous."""
    scheme, _, rest = url.partition("://")
    if is_s3(url) and rest.startswith(_ANONYMOUS):
        return f"{scheme}://{rest.removeprefix(_ANONYMOUS)}", True
    return url, False


def anonymous(url: str) -> str:
    """`url`, which is of S3's scheme, to be read without credentials."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{_ANONYMOUS}{rest}"


def has_usual_settings(url: str) -> bool:
    """A client other than s3fs can be given all that fsspec's settings say of `url`."""
    given = fsspec.config.conf.get("s3", {})
    return (
        url.startswith("s3://")
        and importlib.util.find_spec("botocore") is not None
        and set(given) <= _KNOWN_SETTINGS
        and set(given.get("client_kwargs", {})) <= _KNOWN_KEYWORDS
    )


@dataclass(frozen=True)
class S3Settings:
    """Where the objects below an S3 URL are, and how to sign requests for them."""

    bucket: str
    prefix: str
    endpoint: str
    """Scheme, host and port of the server, without the bucket."""
    region: str
    credentials: Credentials | None
    """botocore's, which renew themselves where they can; None: anonymous."""

    @classmethod
    def from_environment(cls, url: str) -> S3Settings:
        """The settings of this process for `url`: botocore's, under fsspec's `s3` section.

        Raises:
            botocore.exceptions.NoCredentialsError: none are found, and `url` is not anonymous.
        """
        import botocore.exceptions
        import botocore.session

        plain, anonymous = split_anonymous(url)
        bucket, _, prefix = plain.removeprefix("s3://").partition("/")
        given = fsspec.config.conf.get("s3", {})
        session = botocore.session.Session(profile=given.get("profile"))
        if given.get("key"):
            session.set_credentials(given["key"], given.get("secret"), given.get("token"))
        keywords = dict(given.get("client_kwargs", {}))
        if given.get("endpoint_url"):
            keywords["endpoint_url"] = given["endpoint_url"]
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", **{"region_name": region, **keywords})
        where = (bucket, prefix, client.meta.endpoint_url, client.meta.region_name)
        if anonymous or str(given.get("anon", "")).lower() in ("true", "1"):
            return cls(*where, None)
        credentials = session.get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError
        return cls(*where, credentials)

    @property
    def names_bucket_in_host(self) -> bool:
        """Amazon's own servers want the bucket before the host's name, where TLS can do with that."""
        return self.endpoint.endswith(".amazonaws.com") and "." not in self.bucket
