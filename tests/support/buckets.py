"""Buckets of S3 servers of our own, in processes beside the tests, on the loopback interface: moto, and a real Ceph."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import boto3

from connectors.s3.store import S3Store
from tests.support.ceph import ceph_endpoint

_NUMBERS = itertools.count()
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@functools.cache
def s3_endpoint() -> str:
    """The server's URL; it is started at the first call and ends with this process. Its credentials are set for it."""
    os.environ.update(CREDENTIALS)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.moto_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return f"http://127.0.0.1:{int(server.stdout.readline())}"


def endpoint_of(server: str) -> str:
    """The URL of `moto` or `ceph`, started at the first call. One pair of credentials is good for both."""
    if server == "moto":
        return s3_endpoint()
    os.environ.update(CREDENTIALS)
    return ceph_endpoint(CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"])


def new_bucket(endpoint: str = "") -> str:
    """The name of an empty bucket at a server (moto's, if none is given)."""
    name = f"lake-{os.getpid()}-{next(_NUMBERS)}"
    boto3.client("s3", endpoint_url=endpoint or s3_endpoint()).create_bucket(Bucket=name)
    return name


def copy_of(store: S3Store, directory: Path) -> Path:
    """Everything that a store holds, as files in a directory: for readers that know only those."""
    for found in store.list(""):
        path = directory / found.key
        path.parent.mkdir(parents=True, exist_ok=True)
        assert store.get(found.key, into=path) is not None, f"{found.key} was listed and is gone"
    return directory
