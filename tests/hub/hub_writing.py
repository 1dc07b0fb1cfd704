"""What the hub of the tests keeps of a repository, and how it takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

LARGE = (".safetensors", ".parquet", ".bin", ".png")
LFS_JSON = "application/vnd.git-lfs+json"


def sha1(data: bytes) -> str:
    """Return what the hub names content by."""
    return hashlib.sha1(data).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each revision, and how the hub answers for it.

    Attributes:
        files: Content by path; of the branch ``main``.
        branches: Content by path, of other branches.
        sha: Commit of ``main``.
        gated: Nobody may read it whose token is not in ``readers``.
        status: A status code that every request for it is answered with, once ``healthy`` requests were served.
        cuts: How often the connection is cut in the middle of each large file before it is sent whole.
        owner: Who may write to it.
    """

    files: dict[str, bytes]
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sha: str = ""
    gated: bool = False
    private: bool = False
    readers: tuple[str, ...] = ()
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cuts: int = 0
    owner: str = ""
    uploads: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    commits: int = 0

    def __post_init__(self):
        self.sha = self.sha or sha1(repr(sorted(self.files)).encode())

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files of a revision, if there is one."""
        if revision in ("main", self.sha):
            return self.sha, self.files
        for name, files in self.branches.items():
            commit = sha1(name.encode() + self.sha.encode())
            if revision in (name, commit):
                return commit, files
        return None


class Writing:
    """The part of the handler that creates repositories and takes commits."""

    hub: Any
    body: bytes
    token: str
    _error: Any
    _may_read: Any
    _json: Any

    def _may_write(self, owner: str) -> bool:
        name, role = self.hub.users.get(self.token, ("", ""))
        if name and role == "write" and owner == name:
            return True
        self._error(403 if name else 401, "", f"You don't have the rights to write to the namespace {owner!r}")
        return False

    def _create(self) -> None:
        request = json.loads(self.body)
        owner = request.get("organization") or self.hub.users.get(self.token, ("", ""))[0]
        name = f"{owner}/{request['name']}"
        if not self._may_write(owner):
            return None
        if ("models", name) in self.hub.repos:
            return self._error(
                409, "", "You already created this model repo", body={"url": f"{self.hub.endpoint}/{name}"}
            )
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.add("models", name, {".gitattributes": ""}, owner=owner, private=private)
        return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def _auth_check(self, repo: Repo, parts: dict[str, str]) -> None:
        if not self._may_read(repo, parts["id"]):
            return
        if not parts.get("write") or self._may_write(repo.owner):
            self._json({})

    def _preupload(self, repo: Repo, parts: dict[str, str]) -> None:
        if not self._may_write(repo.owner):
            return
        files = json.loads(self.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in files]
        self._json({"files": [mode | {"shouldIgnore": False} for mode in modes], "commitOid": repo.sha})

    def _lfs(self, repo: Repo, parts: dict[str, str]) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            location = f"{self.hub.storage}/cdn/models/{parts['id']}/{entry['oid']}"
            objects.append(
                {"oid": entry["oid"], "size": entry["size"], "actions": {"upload": {"href": location, "header": {}}}}
            )
        self._json({"transfer": "basic", "objects": objects}, {"Content-Type": LFS_JSON})

    def _commit(self, repo: Repo, parts: dict[str, str]) -> None:
        if not self._may_write(repo.owner):
            return
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del repo.files[value["path"]]
                repo.deleted.append(value["path"])
            if item["key"] in ("file", "lfsFile"):
                repo.uploads.append(value["path"])
        repo.commits += 1
        repo.sha = sha1(repr(sorted(repo.files.items())).encode())
        self._json({"commitUrl": f"{self.hub.endpoint}/{parts['id']}/commit/{repo.sha}", "commitOid": repo.sha})
