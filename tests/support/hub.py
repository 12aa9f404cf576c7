"""A Hugging Face hub on the loopback interface, for the real client libraries.

It serves model and dataset repositories from local folders: a client that gets `hub.url` as
HF_ENDPOINT needs nothing else. Requests are counted, and failures can be ordered.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<action>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<folder>/.+)?)?"
)
_FILE = re.compile(
    r"(?P<kind>/datasets)?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)


@dataclass
class _Failure:
    path_part: str
    times: int
    status: int | None
    cut_after: int | None
    error_code: str


class LoopbackHub:
    """Serves repositories given as {"org/name": folder}, or {"org/name": {"revision": folder}}.

    The commit of a revision is a hash of its files. `requests` counts (method, path without the
    query); `downloads(name)` how often each file's bytes were sent. Use it as a context manager.
    """

    def __init__(
        self,
        models: dict[str, Path | dict[str, Path]] | None = None,
        datasets: dict[str, Path | dict[str, Path]] | None = None,
    ) -> None:
        self.repositories = {
            (kind, name): folders if isinstance(folders, dict) else {"main": folders}
            for kind, given in (("models", models), ("datasets", datasets))
            for name, folders in (given or {}).items()
        }
        self.requests: Counter[tuple[str, str]] = Counter()
        self.failures: list[_Failure] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            loopback = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self,
        path_part: str,
        *,
        status: int | None = None,
        cut_after: int | None = None,
        times: int = 1,
        error_code: str = "",
    ) -> None:
        """Fail the next `times` requests whose path contains `path_part`.

        With `status` it is the answer, `error_code` its X-Error-Code (such as GatedRepo); with
        `cut_after` the connection closes after that many bytes of a file.
        """
        self.failures.append(_Failure(path_part, times, status, cut_after, error_code))

    def downloads(self, name: str) -> dict[str, int]:
        """File name -> number of GET requests, for one repository."""
        pattern = re.compile(rf"(?:/datasets)?/{re.escape(name)}/resolve/[^/]+/(.+)")
        counts: Counter[str] = Counter()
        for (method, path), count in self.requests.items():
            if method == "GET" and (match := pattern.fullmatch(path)):
                counts[match[1]] += count
        return dict(counts)

    def commit(self, name: str, revision: str = "main", kind: str = "models") -> str:
        """The 40 hexadecimal digits that name the present content of a revision."""
        digest = hashlib.sha1()
        for path, content in _files(self.repositories[kind, name][revision]).items():
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def find(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files of a branch, tag or commit; None where there is no such thing."""
        for known, folder in self.repositories.get((kind, name), {}).items():
            commit = self.commit(name, known, kind)
            if revision in (known, commit):
                return commit, _files(folder)
        return None


class _Handler(BaseHTTPRequestHandler):
    loopback: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: tests read the counts."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self._count(path)
        if failure and failure.status:
            return self._send(failure.status, b"{}", {"X-Error-Code": failure.error_code})
        if match := _FILE.fullmatch(path):
            kind = "datasets" if match["kind"] else "models"
            found = self.loopback.find(kind, match["name"], match["revision"])
            if found and match["file"] in found[1]:
                return self._send_file(*found, match["file"], failure)
            return self._send_missing(match["name"], kind, "EntryNotFound" if found else "")
        if match := _API.fullmatch(path):
            kind, name = match["kind"], match["name"]
            found = self.loopback.find(kind, name, match["revision"] or "main")
            if found is None:
                return self._send_missing(name, kind, "")
            return self._send_api(*found, match, {**parse_qs(url.query), **_parse_body(body)})
        return self._send(404, b"{}")

    def _count(self, path: str) -> _Failure | None:
        with self.loopback.lock:
            self.loopback.requests[self.command, path] += 1
            for failure in self.loopback.failures:
                wanted = failure.status or self.command == "GET"
                if failure.times and wanted and failure.path_part in path:
                    failure.times -= 1
                    return failure
        return None

    def _send_api(
        self,
        commit: str,
        files: dict[str, bytes],
        match: re.Match[str],
        query: dict[str, list[str]],
    ) -> None:
        if match["action"] in ("tree", "paths-info"):
            wanted = (match["folder"] or "").strip("/")
            entries = [_entry(path, content) for path, content in files.items()]
            folders = sorted(
                {str(parent) for path in files for parent in Path(path).parents} - {"."}
            )
            entries += [
                {"type": "directory", "path": path, "oid": _blob(b""), "size": 0}
                for path in folders
            ]
            if match["action"] == "paths-info":
                answer: Any = [
                    entry for entry in entries if entry["path"] in query.get("paths", [])
                ]
            elif query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                answer = [entry for entry in entries if entry["path"].startswith(wanted)]
            else:
                answer = [
                    entry for entry in entries if str(Path(entry["path"]).parent) == (wanted or ".")
                ]
        else:
            answer = {
                "id": match["name"],
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
                "lastModified": "2025-01-01T00:00:00.000Z",
                "createdAt": "2025-01-01T00:00:00.000Z",
            }
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(
        self, commit: str, files: dict[str, bytes], name: str, failure: _Failure | None
    ) -> None:
        content = files[name]
        entry = _entry(name, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, size = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            status, content = 206, content[start : end + 1]
        self._send(status, content, headers, failure.cut_after if failure else None)

    def _send_missing(self, name: str, kind: str, error_code: str) -> None:
        exists = (kind, name) in self.loopback.repositories
        code = error_code or ("RevisionNotFound" if exists else "RepoNotFound")
        self._send(404, b"{}", {"X-Error-Code": code})

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for header, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_after])
        if cut_after is not None:
            self.close_connection = True


def _files(folder: Path) -> dict[str, bytes]:
    """Path relative to the folder -> content, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """One file of a tree listing; large file types as the hub keeps them, named by SHA-256."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if path.endswith((".safetensors", ".parquet")):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry


def _blob(content: bytes) -> str:
    """What git calls this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _parse_body(body: bytes) -> dict[str, list[str]]:
    """The fields of a POST: JSON or form, every value a list."""
    if not body:
        return {}
    if not body.startswith(b"{"):
        return parse_qs(body.decode())
    return {
        key: value if isinstance(value, list) else [value]
        for key, value in json.loads(body).items()
    }
