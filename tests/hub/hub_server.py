"""A small hub on 127.0.0.1: the part of the Hugging Face hub's HTTP protocol that its clients use.

Headers and codes are those that ``huggingface_hub`` reads: ``ETag``, ``X-Repo-Commit``, ``X-Linked-Etag``,
``X-Linked-Size``, ``X-Error-Code``, ``X-Error-Message``, ``Retry-After``, redirects to another host for large files.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_writing import LARGE, Repo, Writing, sha1


class Hub:
    """The server and what it holds.

    Attributes:
        repos: Repositories by kind (``models`` or ``datasets``) and id.
        users: Name and role (``read`` or ``write``) by token.
        requests: Every request: method, path, and the token that came with it.
        endpoint: What ``HF_ENDPOINT`` should be.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, tuple[str, str]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.blobs: dict[str, bytes] = {}
        handler = type("Bound", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        # Another port is another origin, as the storage of large files is.
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, kind: str, name: str, files: dict[str, Any], **options: Any) -> Repo:
        """Add a repository; files may be given as text."""
        content = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        repo = self.repos[kind, name] = Repo(content, **options)
        for files_of in (repo.files, *repo.branches.values()):
            self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files_of.values()}
        return repo


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": sha1(data), "size": len(data), "path": path}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": sha1(path.encode()), "size": 0, "path": path}


class _Handler(Writing, BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.token))
        if path.startswith("/cdn/"):
            return self._content(path)
        if self.token and self.token not in self.hub.users:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._who()
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path in ("/api/models", "/api/datasets"):
            return self._search(path.rsplit("/", 1)[1])
        for pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                parts = {"kind": "models"} | {k: v for k, v in match.groupdict().items() if v is not None}
                repo = self._repo(parts["kind"], parts["id"])
                return None if repo is None else getattr(self, action)(repo, parts)
        return self._error(404, "", f"No route for {self.command} {path}")

    def _repo(self, kind: str, name: str) -> Repo | None:
        repo = self.hub.repos.get((kind, name))
        user = self.hub.users.get(self.token, ("", ""))[0]
        if repo is None or (repo.private and user != repo.owner):
            # The hub does not tell strangers whether a private repository exists.
            if self.token:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, "", "Invalid username or password.")
            return None
        if repo.status:
            self._error(repo.status, "", "The server is tired", repo.headers)
            return None
        return repo

    def _may_read(self, repo: Repo, name: str) -> bool:
        if not repo.gated or self.token in repo.readers:
            return True
        if self.token:
            message = (
                f"Access to {name} is restricted and you are not in the authorized list. Visit it to ask for access."
            )
        else:
            message = f"Access to {name} is restricted. You must have access to it and be authenticated. Please log in."
        self._error(403 if self.token else 401, "GatedRepo", message)
        return False

    def _info(self, repo: Repo, parts: dict[str, str]) -> None:
        revision = repo.at(parts.get("rev") or "main")
        if revision is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        name = parts["id"]
        siblings = [{"rfilename": path} for path in sorted(revision[1])]
        date, gated = "2026-01-01T00:00:00.000Z", "manual" if repo.gated else False
        info = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": revision[0], "siblings": siblings}
        info |= {"private": repo.private, "gated": gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return self._json(info | {"_id": "0", "lastModified": date, "createdAt": date})

    def _nothing(self, repo: Repo, parts: dict[str, str]) -> None:
        self._json({"discussions": [], "count": 0, "start": 0} if parts["what"] == "discussions" else [])

    def _refs(self, repo: Repo, parts: dict[str, str]) -> None:
        def refs_of(names: list[str]) -> list[dict[str, str]]:
            return [{"name": n.split("/")[-1], "ref": n, "targetCommit": repo.at(n)[0]} for n in names]  # type: ignore[index]

        converted = [name for name in repo.branches if name.startswith("refs/convert/")]
        branches = ["main"] + [name for name in repo.branches if name not in converted]
        self._json({"branches": refs_of(branches), "converts": refs_of(converted), "tags": []})

    def _tree(self, repo: Repo, parts: dict[str, str]) -> None:
        revision = repo.at(parts["rev"])
        if revision is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if not self._may_read(repo, parts["id"]):
            return None
        below = f"{parts['path']}/" if parts.get("path") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, data in sorted(revision[1].items()):
            if not path.startswith(below):
                continue
            rest = path.removeprefix(below).split("/")
            folders |= {
                below + "/".join(rest[:depth]) for depth in range(1, len(rest) if recursive else min(len(rest), 2))
            }
            if recursive or len(rest) == 1:
                entries.append(_entry(path, data))
        if below and not entries and not folders:
            return self._error(404, "EntryNotFound", f"{below} does not exist")
        directories = [
            {"type": "directory", "oid": sha1(name.encode()), "size": 0, "path": name} for name in sorted(folders)
        ]
        return self._json(directories + entries)

    def _paths_info(self, repo: Repo, parts: dict[str, str]) -> None:
        revision = repo.at(parts["rev"])
        if revision is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if not self._may_read(repo, parts["id"]):
            return None
        form = "json" not in (self.headers.get("Content-Type") or "")
        paths = parse_qs(self.body.decode()).get("paths", []) if form else json.loads(self.body)["paths"]
        entries: list[dict[str, Any]] = []
        for path in paths:
            if path in revision[1]:
                entries.append(_entry(path, revision[1][path]))
            elif any(name.startswith(f"{path}/") for name in revision[1]):
                entries.append(_folder(path))
        return self._json(entries)

    def _resolve(self, repo: Repo, parts: dict[str, str]) -> None:
        revisions = [*sorted(repo.branches, key=len, reverse=True), "main", parts["rest"].split("/")[0]]
        revision = next(name for name in revisions if parts["rest"].startswith(f"{name}/"))
        snapshot, path = repo.at(revision), parts["rest"].removeprefix(f"{revision}/")
        if snapshot is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        commit = {"X-Repo-Commit": snapshot[0]}
        if not self._may_read(repo, parts["id"]):
            return None
        if path not in snapshot[1]:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        data = snapshot[1][path]
        if not path.endswith(LARGE):
            return self._send(200, data, commit | {"ETag": f'"{sha1(data)}"', "Content-Type": "text/plain"})
        digest = hashlib.sha256(data).hexdigest()
        self.hub.blobs.setdefault(digest, data)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        location = f"{self.hub.storage}/cdn/{parts['kind']}/{parts['id']}/{digest}"
        return self._send(302, b"", commit | linked | {"Location": location})

    def _content(self, path: str) -> None:
        kind, name, digest = (
            path.removeprefix("/cdn/").split("/", 1)[0],
            path.split("/", 3)[3].rsplit("/", 1)[0],
            path[-64:],
        )
        data, repo = self.hub.blobs.get(digest), self.hub.repos[kind, name]
        if self.token:
            return self._error(400, "", "The token of the hub must not be sent to the storage")
        if self.command == "PUT":
            self.hub.blobs[digest] = self.body
            return self._send(200, b"", {"ETag": f'"{digest}"'})
        assert data is not None
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or ["", "0"])[1])
        length, headers = len(data), {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
        cut = self.command == "GET" and repo.cuts > 0
        if cut:
            repo.cuts -= 1
        return self._send(206 if start else 200, data[start:], headers, cut=cut)

    def _search(self, kind: str) -> None:
        word, owner = (self.query.get(key, [""])[0].lower() for key in ("search", "author"))
        names = [name for (of, name), repo in self.hub.repos.items() if of == kind and not repo.private]
        names = [name for name in names if word in name.lower() and name.lower().startswith(owner)]
        self._json([{"_id": "0", "id": name, "modelId": name, "tags": [], "private": False} for name in names])

    def _who(self) -> None:
        if not self.token:
            return self._error(401, "", "Invalid username or password.")
        name, role = self.hub.users[self.token]
        token = {"displayName": "test", "role": role}
        return self._json(
            {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
        )

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None, body: Any = None
    ) -> None:
        error_headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        content = json.dumps({"error": message} | (body or {})).encode()
        self._send(status, content, {"Content-Type": "application/json"} | error_headers | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True


_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_ROUTES = (
    (rf"{_API}/revision/(?P<rev>.+)", "_info"),
    (rf"{_API}/refs", "_refs"),
    (rf"{_API}/(?P<what>commits|discussions)(?:/.+)?", "_nothing"),
    (rf"{_API}/tree/(?P<rev>refs/convert/parquet|[^/]+)(?:/(?P<path>.+))?", "_tree"),
    (rf"{_API}/paths-info/(?P<rev>.+)", "_paths_info"),
    (rf"{_API}/auth-check(?P<write>/write)?", "_auth_check"),
    (rf"{_API}/preupload/(?P<rev>.+)", "_preupload"),
    (rf"{_API}/commit/(?P<rev>.+)", "_commit"),
    (_API, "_info"),
    (rf"/{_ID}\.git/info/lfs/objects/batch", "_lfs"),
    (rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<rest>.+)", "_resolve"),
)
