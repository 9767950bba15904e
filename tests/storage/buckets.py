"""An S3 server on loopback, and models in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from urllib.request import Request, urlopen

import boto3
from moto.server import ThreadedMotoServer

KEY, SECRET = "AKIAHFMSTESTS", "a-secret-that-nobody-may-read"


class S3:
    """A server that speaks S3 (moto's), with one bucket."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self._running = True
        urlopen(Request(f"{self.url}/moto-api/reset", method="POST")).close()  # what it keeps is its process's
        self.client = boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        self.client.create_bucket(Bucket="models")

    @property
    def environment(self) -> dict[str, str]:
        """By which S3's clients find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, folder: str, files: Mapping[str, bytes]) -> None:
        for path, raw in files.items():
            self.client.put_object(Bucket="models", Key=f"{folder}/{path}", Body=raw)

    def stop(self) -> None:
        if self._running:
            self._running = False
            self._server.stop()


def sums(files: Mapping[str, bytes]) -> bytes:
    """What `sha256sum` prints of them."""
    return "".join(f"{hashlib.sha256(raw).hexdigest()}  {path}\n" for path, raw in files.items()).encode()
