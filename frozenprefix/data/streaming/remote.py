"""Shards at an address: fetched when they are needed, into a folder of limited size in the user's cache."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from frozenprefix.data.streaming.index import beside, index_tar
from frozenprefix.errors import DataError
from frozenprefix.utils import atomic_file, content_hash, hold_lock, user_cache

logger = logging.getLogger(__name__)
_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte, for http


def is_address(path: str) -> bool:
    """Whether a path is an address that fsspec opens, such as `s3://bucket/shards` or `https://host/shards`.

    Example:
        >>> is_address("https://host/shards"), is_address("pypi://name==1/path"), is_address("data/shards")
        (True, False, False)
    """
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme != "pypi"


class RemoteShards:
    """The shards of an address, as files of a local folder that come when they are asked for.

    Args:
        address: folder of the shards.
        names: of the shards below it.
        limit: bytes of shards that the folder may hold; those that were read longest ago go first.

    Raises:
        DataError: the host is not a public one.

    Example:
        >>> RemoteShards("memory://shards", ["00000.tar"], limit=10**9).paths()[0].name
        '00000.tar'
    """

    def __init__(self, address: str, names: Sequence[str], *, limit: int):
        check_host(address)
        self.address, self.names, self.limit = address.rstrip("/"), list(names), limit
        self.folder = user_cache() / "remote" / content_hash(self.address)[:16]

    def paths(self) -> list[Path]:
        """Where the shards are when they have been fetched."""
        return [self.folder / name for name in self.names]

    def prepare(self, rank: int = 0, processes: int = 1) -> None:
        """Fetch the index of every shard, or make it from the shard, where there is none."""
        for tar in self.paths()[rank::processes]:
            if beside(tar).is_file():
                continue
            try:
                self._download(beside(tar), most=1 << 32)
            except FileNotFoundError:
                index_tar(self.fetch(tar), into=beside(tar))

    def fetch(self, tar: Path) -> Path:
        """The shard, which is downloaded unless it is there.

        Raises:
            DataError: it is not there, is larger than the limit, or the connection fails.
        """
        if tar.is_file():
            os.utime(tar)  # read last
            return tar
        with hold_lock(self.folder / "fetch.lock", f"folder '{self.folder}'", wait=True):
            if not tar.is_file():
                try:
                    self._download(tar, most=self.limit)
                except FileNotFoundError as error:
                    raise DataError(f"{self._address_of(tar)}: is not there; check `path` and `shards`") from error
                self._make_room(tar)
        return tar

    def _address_of(self, path: Path) -> str:
        return f"{self.address}/{path.relative_to(self.folder).as_posix()}"

    def _download(self, path: Path, *, most: int) -> None:
        address = self._address_of(path)
        options = {"client_kwargs": {"timeout": _client_timeout()}} if address.startswith("http") else {}
        done = 0
        try:
            with fsspec.open(address, "rb", **options) as source, atomic_file(path) as draft, draft.open("wb") as file:
                while block := source.read(_BLOCK):
                    done += len(block)
                    if done > most:
                        raise DataError(f"{address}: more than {most} bytes, the limit `remote_gb` of its source")
                    file.write(block)
        except (DataError, FileNotFoundError):
            raise
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{address}: cannot be fetched ({error!r})") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "gcsfs", "s3fs"):
                raise DataError(f"{address}: cannot be fetched ({error!r})") from error
            raise

    def _make_room(self, newest: Path) -> None:
        """Remove the shards that were read longest ago, until the rest fits."""
        kept = sorted((p for p in self.paths() if p.is_file()), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        kept.sort(key=lambda p: p != newest)
        total = 0
        for path in kept:
            total += path.stat().st_size
            if total > self.limit:
                path.unlink(missing_ok=True)  # another process may still have it open


def _client_timeout() -> object:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)


def check_host(address: str) -> None:
    """Refuse an http address of this machine or of a private network.

    Raises:
        DataError: so it is, or the host is unknown.

    Example:
        >>> check_host("http://127.0.0.1/shards")
        Traceback (most recent call last):
        frozenprefix.errors.DataError: http://127.0.0.1/shards: 127.0.0.1 is not a public address; ...
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 443)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{address}: the host is unknown ({error})") from error
    for *_, (host, *_) in found:
        if not ipaddress.ip_address(str(host).partition("%")[0]).is_global:
            raise DataError(f"{address}: {host} is not a public address; mount it as a folder, or use an object store")
