"""Buckets of an S3 server of our own, in this process on the loopback interface: what it holds is in memory only."""

from __future__ import annotations

import functools
import itertools
import os

import boto3
from moto.server import ThreadedMotoServer

_NUMBERS = itertools.count()
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@functools.cache
def s3_endpoint() -> str:
    """The server's URL; it is started at the first call and ends with this process. Its credentials are set for it."""
    os.environ.update(CREDENTIALS)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


def new_bucket() -> str:
    """The name of an empty bucket there."""
    name = f"lake-{next(_NUMBERS)}"
    boto3.client("s3", endpoint_url=s3_endpoint()).create_bucket(Bucket=name)
    return name
