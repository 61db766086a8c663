"""Files at ``s3://``, ``gs://`` and ``https://`` addresses, read through fsspec as they are needed and never stored.

Credentials come from the environment, as each service's own tools take them: ``AWS_ACCESS_KEY_ID`` or ``AWS_PROFILE``,
``GOOGLE_APPLICATION_CREDENTIALS``, ``~/.netrc`` for https. An address that contains credentials is an error when the
recipe is read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

from distill.core.errors import DistillError, InputError, MachineError
from distill.core.installed import install_command

EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "https": None, "http": None, "memory": None}
"""Supported scheme -> the extra that installs its file system; None: it is always installed. ``memory`` is fsspec's
file system within the process."""
BUFFER = 1 << 18
"""Number of bytes per request."""
CHECKSUMS = ("md5Hash", "crc32c", "Content-MD5", "content_md5", "ETag", "etag")
"""fsspec info keys with a checksum: content hashes first, then ETags, which may change with metadata."""


def is_remote(path: str) -> bool:
    """Whether a path is an address and not a local path."""
    return "://" in path


@dataclass(frozen=True)
class Remote:
    """A file at an address; used like the :class:`~pathlib.Path` of a local file.

    Attributes:
        url: address of one file.
    """

    url: str

    def __str__(self) -> str:
        """The address without its query, which may be long and secret."""
        return self.url.partition("?")[0] if self.url.startswith("http") else self.url

    def as_posix(self) -> str:
        """As :meth:`pathlib.PurePath.as_posix`."""
        return str(self)

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return "." + self.name.rpartition(".")[2] if "." in self.name else ""

    @contextmanager
    def opened(self, *, seekable: bool = False) -> Iterator[IO[bytes]]:
        """Open its bytes; parts are fetched as they are read.

        Args:
            seekable: whether the reader needs to seek, for which a web server must support range requests.

        Raises:
            InputError: it is not there or may not be read.
            MachineError: the connection breaks.
        """
        system, path = _system(self.url)
        with _told(self.url):
            in_one = self.url.startswith("http") and not seekable
            plain = system.open(path, "rb", **({"block_size": 0} if in_one else {}))
        with plain, io.BufferedReader(Reading(plain, lambda error: broken(str(self), error)), BUFFER) as stream:
            yield stream

    def num_bytes(self) -> int | None:
        """Its size; None if the server does not report it."""
        size = self._info().get("size")
        return size if isinstance(size, int) else None

    def checksum(self) -> str | None:
        """The checksum that the server reports for its bytes, so that they need not be read to compare them; None if
        there is none."""
        info = self._info()
        return next((f"{key}:{info[key]}" for key in CHECKSUMS if info.get(key)), None)

    def _info(self) -> dict[str, Any]:
        system, path = _system(self.url)
        with _told(self.url):
            found: dict[str, Any] = system.info(path)
        return found


def find(url: str, counts: Callable[[str], bool], expected: Sequence[str]) -> list[Remote]:
    """Find the files at an address: a file, a folder (recursively) or a glob.

    Args:
        url: the address.
        counts: function: file name -> whether a file of a folder is wanted.
        expected: suffixes of the wanted file names, for the error.

    Raises:
        InputError: no file is there, the scheme is unknown, or the package that reads it is not installed.
    """
    system, path = _system(url)
    web = url.startswith("http")
    with _told(url):
        if any(sign in path for sign in ("*[" if web else "*?[")):
            names = [name for name in system.glob(path) if not name.endswith("/")]
        elif not web and system.isdir(path):
            names = [name for name in system.find(path) if counts(name.rpartition("/")[2])]
            if not names:
                raise InputError(f"{url}: no file in this folder ends in {', '.join(expected)}")
        else:
            system.info(path)
            names = [path]
    if not names:
        raise InputError(f"{url}: no such file")
    return [Remote(system.unstrip_protocol(name)) for name in names]


def check_reader(paths: Sequence[str]) -> None:
    """Check that addresses can be read here, without a request to the network.

    Raises:
        InputError: a scheme is unknown, or its package is not installed.
    """
    for path in paths:
        if is_remote(path):
            _system(path)


@cache
def _system(url: str) -> tuple[Any, str]:
    """The file system behind an address, and the path in it."""
    import fsspec

    scheme = url.partition("://")[0]
    if scheme not in EXTRAS:
        raise InputError(f"{Remote(url)}: {scheme}:// is not read here; expected s3://, gs:// or https://")
    more = {"client_kwargs": {"trust_env": True}} if scheme.startswith("http") else {}  # proxies, and ~/.netrc
    try:
        system, path = fsspec.core.url_to_fs(url, **more)
    except ImportError as error:
        extra = EXTRAS[scheme]
        how = install_command(extra) if extra else "pip install aiohttp"
        raise InputError(f"{Remote(url)}: {scheme}:// needs a package that is not installed: {how} ({error})") from None
    except Exception as error:
        raise unreachable(url, error) from None
    return system, path


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Convert any error of a file system to one with a message of one line."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:  # of fsspec, of the service's own library and of the network
        raise unreachable(url, error) from None


def unreachable(url: str, error: Exception) -> InputError:
    """The error to raise if a file cannot be opened."""
    shown = str(Remote(url))
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the cause may be a connection error
    if isinstance(error, FileNotFoundError) or getattr(error, "status", 0) == 404:
        return InputError(f"{shown}: no such file")
    why = " ".join(str(error).replace(url, shown).split())[:300]
    login = isinstance(error, PermissionError) or "redential" in why or getattr(error, "status", 0) in (401, 403)
    hint = "; credentials are taken from the environment" if login else ""
    return InputError(f"{shown}: cannot be read ({type(error).__name__}{': ' * bool(why)}{why}){hint}")


def broken(shown: str, error: Exception) -> DistillError:
    """The error to raise if reading ends before the end of the file."""
    why = " ".join(str(error).split())[:200]
    if "range requests" in why:
        return InputError(f"{shown}: the server sends whole files only; fetch it, and name the local file")
    return MachineError(f"{shown}: the connection broke ({type(error).__name__}: {why}); the same command goes on")


class Reading(io.RawIOBase):
    """A stream that raises only the project's own errors, because readers on top of it would catch others.

    Args:
        stream: has ``read``, and ``seek`` and ``tell`` if it is ``seekable``.
        told: converts an exception of ``read`` to the one to raise.
    """

    def __init__(self, stream: Any, told: Callable[[Exception], DistillError]):
        self._stream, self._told = stream, told

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """Whether the wrapped stream is seekable."""
        return bool(self._stream.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position; see :meth:`io.IOBase.seek`."""
        self._stream.seek(offset, whence)
        return int(self._stream.tell())

    def tell(self) -> int:
        """The current position."""
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it; 0 at the end."""
        try:
            data = self._stream.read(len(buffer))
        except DistillError:
            raise
        except Exception as error:
            raise self._told(error) from None
        buffer[: len(data)] = data
        return len(data)
