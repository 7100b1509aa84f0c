"""An object store in a bucket of S3, or of a server that speaks its protocol.

Guarantees: an object appears whole or not at all, and is durable when `put` returns, as the protocol promises. A
conditional write is decided by the server (If-None-Match, If-Match), and is one request however big it is: there are
servers that ignore the condition at the end of an upload in parts. Each write carries a token of its own in the
object's metadata, so a write whose answer was lost, and whose repetition the server then refuses, is recognised as
ours. What a repetition may mend (throttling, 5xx, time-outs, cut connections) is repeated here a few times, then told
as StoreUnavailable; what it cannot mend is told at once, with what to look at.

Other big objects go up in parts, one at a time: memory is bounded by a part. An upload that fails is aborted; what a
crash leaves is for the bucket's lifecycle rule (AbortIncompleteMultipartUpload). Credentials come by boto3's usual
chain.

It creates no bucket, sets no policies, and does not probe whether the server keeps its promises (cdc.lake.probe).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import boto3
import tenacity
import urllib3
from botocore import exceptions as boto
from botocore.config import Config

from cdc.errors import CdcError, ConfigError, InvariantBroken, StoreConflict, StoreUnavailable
from cdc.ports import StoredObject

T = TypeVar("T")

PART_BYTES: Final = 16 << 20
"""What is bigger goes up in parts of this size, or as much greater as 10,000 parts need."""
_CHUNK: Final = 1 << 20
_PARTS_MAX: Final = 10_000
_DELETED_AT_ONCE: Final = 1000
"""The protocol's limits of one upload and of one DeleteObjects."""
_TOKEN: Final = "cdc-write"
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn")
_ATTEMPTS: Final = 5
_QUICK_S: Final = 10.0
WAIT_S = 0.1
"""Before the first repetition, about; each time twice as long."""
OPTIONS: Final = frozenset({"region", "endpoint_url", "addressing_style", "storage_class", "sse", "sse_kms_key_id"})
"""`sse`: AES256 or aws:kms. `storage_class` is for data files only: small objects of a log are read all the time."""

_AGAIN: Final = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable",
                 "Throttling", "ThrottlingException", "ConditionalRequestConflict", "OperationAborted"}  # fmt: skip
_REFUSED: Final = {"PreconditionFailed", "412"}
_GONE: Final = {"NoSuchKey", "NoSuchUpload", "404", "NotFound"}
_HINTS: Final = {
    "NoSuchBucket": "create the bucket, or correct lake.url",
    "AccessDenied": "allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload",
    "InvalidAccessKeyId": "the credentials that boto3's chain finds (environment, profile, role) are not known there",
    "SignatureDoesNotMatch": "the secret key is not the one of that access key, or the endpoint is behind a proxy that"
    " changes requests",
    "ExpiredToken": "renew the session's credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
    "NotImplemented": "this store lacks conditional writes, so it cannot keep a lake",
    "PermanentRedirect": "set lake.region to the bucket's region",
    "AuthorizationHeaderMalformed": "set lake.region to the bucket's region",
}
_CUT: Final = (
    boto.EndpointConnectionError, boto.ConnectionClosedError, boto.ConnectTimeoutError, boto.ReadTimeoutError,
    boto.ResponseStreamingError, boto.IncompleteReadError, boto.HTTPClientError,
)  # fmt: skip


class _Again(StoreUnavailable):
    """A failure that a repetition may mend within this call."""


class S3Store:
    """Objects below `prefix` of a bucket. Thread-safe."""

    def __init__(self, bucket: str, prefix: str = "", options: Mapping[str, str] | None = None) -> None:
        options = options or {}
        self._bucket = bucket
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._session = boto3.session.Session(region_name=options.get("region"))
        self._storage_class = options.get("storage_class", "")
        self._bare_etags = False
        """Whether the server compares etags without their quotation marks."""
        self._encryption = {
            argument: options[name]
            for name, argument in (("sse", "ServerSideEncryption"), ("sse_kms_key_id", "SSEKMSKeyId"))
            if options.get(name)
        }
        try:
            asked = self._session.client("s3", endpoint_url=options.get("endpoint_url")).meta.endpoint_url
            # Where the client really goes: by option, environment or profile. AWS itself is left to each client.
            self._endpoint = "" if (urlsplit(asked).hostname or "").endswith(_AWS) else asked
            self._style = options.get("addressing_style") or ("path" if self._endpoint else "virtual")
            config = Config(
                # What is repeated, and what is not, is decided in one place: here.
                retries={"total_max_attempts": 1},
                connect_timeout=10,
                read_timeout=60,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": self._style},
            )
            client = partial(self._session.client, "s3", endpoint_url=self._endpoint or None)
            self._client: Any = client(config=config)
            # For conditional writes, which are small: a mute connection must not outlast the lease that waits for one.
            self._quick: Any = client(config=config.merge(Config(connect_timeout=5, read_timeout=_QUICK_S)))
        except (boto.BotoCoreError, ValueError) as e:
            raise ConfigError(f"lake: {e}", hint="see lake.region and lake.endpoint_url") from e

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str] | None = None) -> S3Store:
        """The store at `s3://bucket/prefix`; ConfigError if it names no bucket, or an option is unknown."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f'lake.url = "{url}" names no bucket', hint="write s3://BUCKET/PREFIX")
        unknown = sorted(set(options or {}) - OPTIONS)
        if unknown:
            raise ConfigError(
                f"lake: unknown options {', '.join(unknown)}", hint=f"known: {', '.join(sorted(OPTIONS))}"
            )
        return cls(parts.netloc, parts.path, options)

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write bytes (anything with the buffer protocol), return the etag; see ports.ObjectStore."""
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        token = uuid.uuid4().hex
        about: dict[str, Any] = {"Metadata": {_TOKEN: token}, **self._encryption}
        if self._storage_class and key.endswith(".parquet") and "/_delta_log/" not in key:
            about["StorageClass"] = self._storage_class
        view = memoryview(data).cast("B")
        try:
            if len(view) > PART_BYTES and not if_absent and if_match is None:
                return self._put_parts(key, view, where, about)
            client = self._quick if if_absent or if_match is not None else self._client
            write = partial(client.put_object, **where, **about, Body=bytes(view))
            if if_match is not None:
                return self._replace(key, write, token, if_match)
            return self._finish(key, partial(write, IfNoneMatch="*") if if_absent else write, token)
        finally:
            view.release()

    def get(self, key: str, *, into: Path | None = None) -> tuple[bytes, str] | None:
        """The object's bytes (or b"", if they went `into` a file) and etag; None if there is none."""
        name = self._name(key)

        def read() -> tuple[bytes, str]:
            found = self._client.get_object(Bucket=self._bucket, Key=name)
            if into is None:
                return found["Body"].read(), found["ETag"]
            with into.open("wb") as file:
                for piece in found["Body"].iter_chunks(_CHUNK):
                    file.write(piece)
            return b"", found["ETag"]

        return self._or_none(key, read)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in key order."""
        more: dict[str, str] = {}
        while True:
            page = self._call(
                prefix,
                partial(self._client.list_objects_v2, Bucket=self._bucket, Prefix=self._root + prefix, **more),
            )
            for found in page.get("Contents", ()):
                yield StoredObject(
                    key=found["Key"][len(self._root) :],
                    size=int(found["Size"]),
                    modified_at_us=int(found["LastModified"].timestamp() * 1e6),
                    etag=found["ETag"],
                    storage_class=found.get("StorageClass", ""),
                )
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that do not exist are no error."""
        names = [{"Key": self._name(key)} for key in keys]
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = {"Objects": names[start : start + _DELETED_AT_ONCE], "Quiet": True}
            done = self._call(keys[start], partial(self._client.delete_objects, Bucket=self._bucket, Delete=some))
            for failed in done.get("Errors", ()):
                code = str(failed.get("Code"))
                if code not in _GONE:
                    raise StoreUnavailable(f"{failed.get('Key')} in the bucket {self._bucket}: {code}",
                                           hint=_HINTS.get(code, ""))  # fmt: skip

    def move(self, key: str, storage_class: str) -> bool:
        """Rewrite an object in place into another storage class, at the server; see ports.TieredStore. What is bigger
        than the protocol's 5 GB of one copy is refused."""
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        copy = partial(
            self._client.copy_object, **where, CopySource=where, StorageClass=storage_class, **self._encryption
        )
        return self._or_none(key, copy) is not None

    def location(self, key: str) -> tuple[str, dict[str, str]]:
        """`s3://…` of a key, and delta-rs' options for it: the credentials are those that boto3's chain has now."""
        options = {
            "aws_conditional_put": "etag",
            "aws_virtual_hosted_style_request": "false" if self._style == "path" else "true",
        }
        for argument, option in (
            ("ServerSideEncryption", "aws_server_side_encryption"),
            ("SSEKMSKeyId", "aws_sse_kms_key_id"),
        ):
            if argument in self._encryption:
                options[option] = self._encryption[argument]
        if self._session.region_name:
            options["aws_region"] = self._session.region_name
        if self._endpoint:
            scheme, _, host = self._endpoint.partition("://")
            # There it is taken as it is: with the bucket in it, if that is where the bucket's name stands.
            options["aws_endpoint_url"] = (
                self._endpoint if self._style == "path" else f"{scheme}://{self._bucket}.{host}"
            )
            if scheme == "http":
                options["aws_allow_http"] = "true"
        try:
            found = self._session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        except (boto.BotoCoreError, boto.ClientError) as e:
            raise StoreUnavailable(
                f"the credentials for the bucket {self._bucket} cannot be renewed: {type(e).__name__}",
                hint="see what gives them: profile, role or metadata service",
            ) from e
        if frozen is not None:
            options |= {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
            if frozen.token:
                options["aws_session_token"] = frozen.token
        name = self._name(key) if key else self._root.rstrip("/")
        return f"s3://{self._bucket}/{name}", options

    def _name(self, key: str) -> str:
        if any(p in ("", ".", "..") or "\0" in p for p in key.split("/")):
            raise InvariantBroken(f"not an object's key: {key!r}")
        return self._root + key

    def _put_parts(self, key: str, view: memoryview, where: dict[str, str], about: Mapping[str, Any]) -> str:
        upload = self._call(key, partial(self._client.create_multipart_upload, **where, **about))
        where["UploadId"] = upload["UploadId"]
        size = max(PART_BYTES, -(-len(view) // _PARTS_MAX))
        parts = []
        try:
            for number, start in enumerate(range(0, len(view), size), 1):
                body = bytes(view[start : start + size])
                done = self._call(key, partial(self._client.upload_part, **where, PartNumber=number, Body=body))
                parts.append({"PartNumber": number, "ETag": done["ETag"]})
            write = partial(self._client.complete_multipart_upload, **where, MultipartUpload={"Parts": parts})
            return self._finish(key, write, about["Metadata"][_TOKEN])
        except CdcError:
            # If that fails too, it is for the bucket's lifecycle rule; what failed before is what counts.
            with suppress(boto.BotoCoreError, boto.ClientError):
                self._client.abort_multipart_upload(**where)
            raise

    def _replace(self, key: str, write: Callable[..., Any], token: str, etag: str) -> str:
        """Carry out a write over the version that the etag names."""
        bare = etag.strip('"')
        try:
            return self._finish(key, partial(write, IfMatch=bare if self._bare_etags else etag), token)
        except StoreConflict:
            found = None if self._bare_etags else self._head(key)
            if found is None or found["ETag"] != etag or bare == etag:
                raise
        # It refused the very version that it has: Ceph compares etags without their quotation marks.
        done = self._finish(key, partial(write, IfMatch=bare), token)
        self._bare_etags = True
        return done

    def _finish(self, key: str, write: Callable[[], Any], token: str) -> str:
        """Carry out a write; also one whose answer was lost, and that is refused or unknown when it is repeated."""
        # Ceph's answer to the end of an upload in parts has no etag.
        with suppress(StoreConflict, _Missing):
            etag = self._call(key, write).get("ETag")
            if etag:
                return str(etag)
        found = self._head(key)
        if found is not None and found.get("Metadata", {}).get(_TOKEN) == token:
            return str(found["ETag"])
        raise StoreConflict(f"{key} was written, changed or removed by another writer")

    def _head(self, key: str) -> Mapping[str, Any] | None:
        head: Callable[[], Mapping[str, Any]] = partial(
            self._client.head_object, Bucket=self._bucket, Key=self._name(key)
        )
        return self._or_none(key, head)

    def _or_none(self, key: str, read: Callable[[], T]) -> T | None:
        try:
            return self._call(key, read)
        except _Missing:
            return None

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """The request's answer, repeated while that may help. StoreConflict, _Missing, StoreUnavailable."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_exponential_jitter(multiplier=WAIT_S, max=5, jitter=WAIT_S),
            reraise=True,
        )
        return retrying(self._once, key, request)

    def _once(self, key: str, request: Callable[[], T]) -> T:
        what = f"{key or 'the root'} in the bucket {self._bucket}"
        try:
            return request()
        except boto.ClientError as e:
            code = str(e.response.get("Error", {}).get("Code", ""))
            status = int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in _REFUSED or status == 412:
                raise StoreConflict(f"{what}: the condition does not hold") from None
            if code in _GONE:
                raise _Missing(what) from None
            again = code in _AGAIN or status == 429 or (status >= 500 and status != 501)
            kind = _Again if again else StoreUnavailable
            raise kind(f"{what}: {code or status}", hint=_HINTS.get(code, "")) from e
        except _CUT as e:
            raise _Again(f"{what}: {type(e).__name__}", hint="see whether the store's endpoint answers") from e
        except boto.NoCredentialsError as e:
            raise StoreUnavailable(
                f"{what}: no credentials", hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            ) from e
        except boto.BotoCoreError as e:
            raise StoreUnavailable(f"{what}: {type(e).__name__}") from e
        except urllib3.exceptions.HTTPError as e:
            # In the midst of a body not every fault of the connection is wrapped.
            raise _Again(f"{what}: {type(e).__name__}", hint="see whether the store's endpoint answers") from e
        except OSError as e:
            raise StoreUnavailable(f"{what}: its copy cannot be written: {e.strerror}", hint="make room there") from e


class _Missing(StoreUnavailable):
    """There is no such object, or no such upload any more."""


__all__ = ["OPTIONS", "PART_BYTES", "S3Store"]
