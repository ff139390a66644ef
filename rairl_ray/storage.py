"""The place behind an `output_dir` with a scheme (s3://, gs://, file://), through pyarrow's file systems.

Credentials come from the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS), never from the URI.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs as arrow_fs

from rairl_ray.config.machine_rules import bucket_problem
from rairl_ray.config.rules import show
from rairl_ray.errors import ConfigError

STAGING_ENV = "RAIRL_STAGING"
PROBE_SECONDS = 20.0
"""How long a place may take to accept and delete one small object before a run starts."""
CHUNK = 8 << 20
LARGEST_COPY = 5 << 30
"""S3 copies no larger object by itself."""

FAULTS = (OSError, ValueError)
"""What pyarrow raises: ArrowException's descendants for files and words."""


def staging_folder(uri: str) -> Path:
    """The folder of this machine that stands for `uri` while a run is on: same URI, same folder."""
    above = Path(os.environ.get(STAGING_ENV) or Path.home() / ".cache" / "rairl" / "staging").expanduser()
    return above.absolute() / hashlib.sha256(plain(uri).encode()).hexdigest()[:16]


def local_folder(output_dir: str) -> Path:
    """The folder of this machine in which the runs of an `output_dir` are made."""
    return staging_folder(output_dir) if "://" in output_dir else Path(output_dir).absolute()


def plain(uri: str) -> str:
    """The URI without its options (`?endpoint_override=...`) and without a slash at the end."""
    return uri.partition("?")[0].rstrip("/")


class Object(NamedTuple):
    size: int
    modified: int
    """Nanoseconds since 1970, by the clock over there."""


class Store:
    """Objects below one URI, by names with slashes. Every method raises one of FAULTS where it fails."""

    def __init__(self, uri: str) -> None:
        """Raises ConfigError for a URI that no file system can be made of."""
        if why := bucket_problem(uri):
            raise ConfigError(f"output_dir={show(uri)}: {why}")
        parts = urlsplit(uri)
        self.uri, self.plain = uri, plain(uri)
        try:
            self._fs, path = arrow_fs.FileSystem.from_uri(self.plain + uri[len(uri.partition("?")[0]) :])
            if parts.scheme == "s3":
                self._fs = _waiting(self._fs, dict(parse_qsl(parts.query)))
        except FAULTS as error:
            raise self.refusal(error) from None
        self._root = path.rstrip("/")
        self._local = parts.scheme == "file"

    def refusal(self, error: Exception | str, done: str = "written") -> ConfigError:
        """The one line about a place that cannot be used (`done`: written or read)."""
        text = " ".join(str(error).split())
        if "NO_SUCH_BUCKET" in text:
            remedy = "make the bucket, or correct its name"
        elif re.search(r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|CREDENTIAL|(status|code)\W*403\b", text):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of a user who may use it"
        elif any(word in text for word in ("NETWORK_CONNECTION", "no answer")):
            remedy = "check the network and AWS_ENDPOINT_URL"
        else:
            remedy = "give a place that you may use"
        return ConfigError(f"output_dir={show(self.uri)}: cannot be {done}: {text[:300]}; {remedy}")

    def probe(self, seconds: float = PROBE_SECONDS) -> None:
        """Write and delete a small object. Raises ConfigError where that fails or takes too long."""
        name = f".rairl-probe-{uuid.uuid4().hex[:12]}"

        def write_and_delete() -> None:
            self.write(name, b"probe")
            self.delete(name)

        error = within(seconds, write_and_delete)
        if error is not None:
            raise self.refusal(error)

    def look(self, seconds: float = PROBE_SECONDS) -> None:
        """See that the place answers. Raises ConfigError where that fails or takes too long."""
        bucket = self._root.partition("/")[0]

        def ask() -> None:
            found = self._fs.get_file_info([self._root if self._local else bucket])[0]
            if found.type == arrow_fs.FileType.NotFound and not self._local:
                raise FileNotFoundError(f"NO_SUCH_BUCKET: there is no {bucket}")

        error = within(seconds, ask)
        if error is not None:
            raise self.refusal(error, "read")

    def write(self, name: str, content: bytes) -> None:
        """One small object."""
        self._room(name)
        with self._fs.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def upload(self, source: Path, name: str, moved: Callable[[int], None]) -> None:
        """One file as it is now. `moved` is called with the bytes of each piece."""
        self._room(name)
        with open(source, "rb") as file, self._fs.open_output_stream(self._path(name)) as stream:
            while piece := file.read(CHUNK):
                stream.write(piece)
                moved(len(piece))

    def download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._fs.open_input_stream(self._path(name)) as stream, open(target, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        try:
            with self._fs.open_input_stream(self._path(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def names(self, below: str) -> dict[str, Object]:
        """Name below `below` -> its facts, of all objects there."""
        top = self._path(below)
        chosen = arrow_fs.FileSelector(top, recursive=True, allow_not_found=True)
        found = self._fs.get_file_info(chosen)
        return {
            info.path[len(top) + 1 :]: Object(info.size, info.mtime_ns or 0)
            for info in found
            if info.type == arrow_fs.FileType.File
        }

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def move(self, below: str, target: str) -> None:
        """Move all objects from below one name to below another: all copied, then the old ones removed."""
        names = self.names(below)
        for name, (size, _) in names.items():
            old, new = self._path(f"{below}/{name}"), self._path(f"{target}/{name}")
            self._room(f"{target}/{name}")
            if size < LARGEST_COPY:
                self._fs.copy_file(old, new)
                continue
            with self._fs.open_input_stream(old) as source, self._fs.open_output_stream(new) as stream:
                shutil.copyfileobj(source, stream, CHUNK)
        for name in names:
            self.delete(f"{below}/{name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _room(self, name: str) -> None:
        if self._local:
            self._fs.create_dir(os.path.dirname(self._path(name)), recursive=True)


def _waiting(made: arrow_fs.S3FileSystem, options: Mapping[str, str]) -> arrow_fs.S3FileSystem:
    """The same file system with writes that return when their bytes are sent.

    Those of pyarrow's own return at once, and the whole wait is at the end, where nothing tells whether bytes
    move (300 MiB over a slow line: 6.2 s of silence of 6.4 s, against 0.9 s of 24 s; parts go one by one).
    """
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return arrow_fs.S3FileSystem(
        region=made.region,
        endpoint_override=options.get("endpoint_override", environment) or None,
        scheme=options.get("scheme"),
        background_writes=False,
    )


def within(seconds: float, work: Callable[[], None]) -> Exception | str | None:
    """Do something that may hang; what it raised, or that it did not end in time. None: done."""
    result: list[Exception | None] = []

    def run() -> None:
        try:
            work()
            result.append(None)
        except FAULTS as error:
            result.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else f"no answer within {seconds:g} s"
