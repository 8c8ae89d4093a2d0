"""A Hub on this machine: what `huggingface_hub` asks for to look at repositories, to publish and to download.

It keeps what the Hub keeps: repositories of commits, small files as git blobs, large ones by their SHA-256. Faults are
set by `fail`, `cut` and `hold`. Storage by xet is not served, since its wire format is no published interface: programs
are started with `HF_HUB_DISABLE_XET=1`, which uploads over LFS, the library's other way.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SIGNATURE = "signed-for-one-upload-alone"
"""What allows an upload to the storage, as a part of its address."""

_LARGE = re.compile(r"\.(safetensors|gguf|bin|pt|h5|model)$")
_READ_BYTES = 2**14


@dataclass(frozen=True)
class Blob:
    """A file as a commit has it."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What the Hub calls the content by."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: whether it is private, and the files of its commits, the newest last."""

    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    kind: str = "model"

    @property
    def head(self) -> str:
        """The newest commit."""
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        """Its files."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, Blob]) -> str:
        """Add a commit and return its id."""
        listed = json.dumps([len(self.commits), *((name, blob.oid) for name, blob in sorted(files.items()))])
        self.commits.append((hashlib.sha1(listed.encode()).hexdigest(), files))
        return self.head


@dataclass
class User:
    """Whose token it is, what it allows, and what its owner may do in organizations."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scopes: list[dict[str, Any]] = field(default_factory=list)

    def may_write(self, repo: str) -> bool:
        """Tell whether the token may change a repository, or create it."""
        owner = repo.partition("/")[0]
        if self.role == "fineGrained":
            named = [scope for scope in self.scopes if scope["entity"]["name"] in (owner, repo)]
            return any("repo.write" in scope["permissions"] for scope in named)
        return self.role == "write" and (owner == self.name or self.orgs.get(owner) in ("admin", "write"))


@dataclass
class Fault:
    """What happens in place of an answer to requests that match, so many times."""

    pattern: str
    times: int
    status: int | None = None
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    loses: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event | None = None


class HubServer:
    """The Hub's state and how it is disturbed.

    Attributes:
        users: By token.
        repos: By name.
        large: The large files that were uploaded, by their SHA-256.
        requests: Method and path of all that was asked for.
        received: The bytes of large files that arrived, those of broken uploads included.
        page: How many files a page of a listing has.
        part_bytes: Larger files are uploaded in parts of so many bytes.
    """

    def __init__(self) -> None:
        self.users = {"hf_" + "wR1te" * 7: User("me", orgs={"lab": "write", "readers": "read"})}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.page = 1000
        self.part_bytes = 2**30
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        self.address = ""

    @property
    def token(self) -> str:
        """A token that may write."""
        return next(iter(self.users))

    def create(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = True) -> Repo:
        """Create a repository as the Hub does, with files of its owner where there are any."""
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)})
        if files:
            added = {path: Blob(content, bool(_LARGE.search(path))) for path, content in files.items()}
            repo.commit({**repo.files, **added})
        return repo

    def fail(self, pattern: str, status: int, body: str = "", times: int = 10**6, **headers: str) -> Fault:
        """Answer requests whose `METHOD /path` matches with an error."""
        return self._set(
            Fault(pattern, times, status, body, {name.replace("_", "-"): headers[name] for name in headers})
        )

    def cut(self, pattern: str, after_bytes: int = 0, times: int = 1) -> Fault:
        """Close the connection after so many bytes of a request's body."""
        return self._set(Fault(pattern, times, after_bytes=after_bytes))

    def lose(self, pattern: str) -> Fault:
        """Do what a request asks for, and close the connection without an answer."""
        return self._set(Fault(pattern, 1, loses=True))

    def hold(self, pattern: str, after_bytes: int = 0) -> Fault:
        """Wait within a request's body until the fault is `released`; `reached` says that it waits."""
        return self._set(Fault(pattern, 1, after_bytes=after_bytes, released=threading.Event()))

    def heal(self) -> None:
        """End all faults."""
        for fault in self._faults:
            if fault.released:
                fault.released.set()
        self._faults.clear()

    def asked(self, pattern: str) -> list[str]:
        """Return the requests that match."""
        return [f"{method} {path}" for method, path in self.requests if re.search(pattern, f"{method} {path}")]

    def content(self, name: str) -> dict[str, bytes]:
        """Return the files of a repository."""
        return {path: blob.content for path, blob in self.repos[name].files.items()}

    def _set(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def fault(self, request: str) -> Fault | None:
        """Return what disturbs a request."""
        with self.lock:
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """Serve a Hub of its own while the context lasts."""
    hub = HubServer()
    handler = type("OwnHub", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            hub.heal()
            server.shutdown()


class _Broken(Exception):
    """The connection is not to be used any more."""


class _Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        path = unquote(address.path)
        self.hub.requests.append((self.command, path))
        try:
            fault = self.hub.fault(f"{self.command} {path}")
            body = self._body(fault, counted=self.command == "PUT")
            if fault and fault.status:
                self._answer(fault.status, fault.body.encode(), fault.headers)
                return
            if fault and fault.loses:
                self.wfile = io.BytesIO()
            self._route(path, body)
            if fault and fault.loses:
                raise _Broken
        except _Refusal as refusal:
            said = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self._answer(refusal.status, json.dumps({"error": refusal.message}).encode(), said)
        except (_Broken, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self, fault: Fault | None, *, counted: bool) -> bytes:
        """Read a request's body, unless a fault ends or holds that."""
        stop = fault.after_bytes if fault else None
        found = bytearray()
        for part in self._parts():
            if counted:
                self.hub.received += len(part)
            found += part
            if stop is not None and len(found) >= stop:
                break
        if fault and stop is not None:
            fault.reached.set()
            if fault.released:
                fault.released.wait()
            raise _Broken
        return bytes(found)

    def _parts(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self.rfile.read1(min(left, _READ_BYTES))
            if not part:
                raise _Broken
            left -= len(part)
            yield part

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), headers)

    def _user(self) -> User | None:
        said = self.headers.get("Authorization")
        if said is None:
            return None
        user = self.hub.users.get(said.removeprefix("Bearer "))
        if user is None:
            # As some servers do, which is why a program has to mask what they answer.
            raise _Refusal(401, f"Invalid credentials in Authorization header: {said}")
        return user

    def _route(self, path: str, body: bytes) -> None:
        """Answer a request; whoever reads this reads what the library uses of the Hub."""
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.startswith("/storage/"):
            return self._store(path, body)
        if found := re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(found["repo"], json.loads(body))
        if found := re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self._resolve(**found.groupdict())
        if found := re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>[\w-]+)(?:/(?P<rest>.+))?)?", path):
            repo, what = found["repo"], found["what"]
            if what in (None, "revision"):
                return self._info(repo)
            if what == "tree":
                return self._tree(repo, found["rest"])
            if what == "auth-check":
                self._writable(repo)
                return self._json({})
            if what == "preupload":
                return self._preupload(repo, json.loads(body)["files"])
            if what == "commit":
                return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        raise _Refusal(404, f"Cannot {self.command} {path}")

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        token: dict[str, Any] = {"displayName": "a token", "role": user.role}
        if user.role == "fineGrained":
            token["fineGrained"] = {"global": [], "scoped": user.scopes}
        self._json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    def _create(self, asked: dict[str, Any]) -> None:
        user = self._user()
        name = f"{asked['organization'] or (user.name if user else '')}/{asked['name']}"
        if user is None or not user.may_write(name):
            owner = asked["organization"]
            raise _Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        with self.hub.lock:
            if name in self.hub.repos:
                raise _Refusal(409, "You already created this model repo")
            # A repository is public unless it is asked to be private.
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.create(name, private=private)
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def _validate(self, card: str) -> None:
        front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        try:
            metadata = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            told = {"errors": [{"message": str(error)}], "warnings": []}
            return self._answer(400, json.dumps(told).encode())
        missing = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._json({"errors": [], "warnings": missing})

    def _readable(self, name: str) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        owner = name.partition("/")[0]
        if repo is None or (repo.private and (user is None or owner not in (user.name, *user.orgs))):
            raise _Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, name: str) -> Repo:
        repo, user = self._readable(name), self._user()
        if user is None or not user.may_write(name):
            raise _Refusal(403, "Forbidden: you don't have write access to this repository")
        return repo

    def _info(self, name: str) -> None:
        repo = self._readable(name)
        siblings = [{"rfilename": path} for path in repo.files]
        self._json({"id": name, "sha": repo.head, "private": repo.private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._readable(name)
        revision, _, folder = revision.partition("/")
        files = self._at(repo, revision)
        below = {path: blob for path, blob in sorted(files.items()) if not folder or path.startswith(f"{folder}/")}
        if folder and not below:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        listed = [self._entry(path, blob) for path, blob in list(below.items())[start : start + self.hub.page]]
        following = start + self.hub.page
        asked = urlsplit(self.path).path
        link = {"Link": f'<{self.hub.address}{asked}?recursive=True&cursor={following}>; rel="next"'}
        self._json(listed, link if following < len(below) else None)

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        size = len(blob.content)
        entry = {"type": "file", "path": path, "size": size, "oid": blob.oid}
        if blob.large:
            entry["lfs"] = {"oid": blob.oid, "size": size, "pointerSize": 130}
            entry["oid"] = hashlib.sha1(blob.oid.encode()).hexdigest()
        return entry

    @staticmethod
    def _at(repo: Repo, revision: str) -> dict[str, Blob]:
        for commit, files in repo.commits:
            if commit == revision:
                return files
        if revision != "main":
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.files

    def _preupload(self, name: str, files: list[dict[str, Any]]) -> None:
        repo = self._writable(name)
        answers = []
        for file in files:
            known = repo.files.get(file["path"])
            large = bool(_LARGE.search(file["path"])) or file["size"] > 10 * 2**20
            ignored = repo.files[".gitignore"].content.decode().split() if ".gitignore" in repo.files else []
            answer = {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(file["path"], pattern) for pattern in ignored),
            }
            answers.append({**answer, **({"oid": known.oid} if known else {})})
        self._json({"files": answers})

    def _batch(self, name: str, asked: dict[str, Any]) -> None:
        self._writable(name)
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                answer["actions"] = {"upload": self._upload_action(oid, size)}
                answer["actions"]["verify"] = {"href": f"{self.hub.address}/storage/verify/{oid}"}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        place, signed = f"{self.hub.address}/storage/{oid}", f"X-Amz-Signature={SIGNATURE}"
        if size <= self.hub.part_bytes:
            return {"href": f"{place}?{signed}"}
        count = ceil(size / self.hub.part_bytes)
        parts = {f"{number:05}": f"{place}/{number}?{signed}" for number in range(1, count + 1)}
        return {"href": f"{place}/complete?{signed}", "header": {"chunk_size": str(self.hub.part_bytes), **parts}}

    def _store(self, path: str, body: bytes) -> None:
        """Take a large file, or a part of one; what does not have the digest that it was announced with is refused."""
        _, _, oid, *rest = path.split("/")
        if oid == "verify":
            if rest[0] not in self.hub.large:
                raise _Refusal(404, "Object not found")
            return self._json({})
        if self.query.get("X-Amz-Signature") != SIGNATURE or self.headers.get("Authorization"):
            raise _Refusal(403, "Request is not signed")
        if rest and rest[0] != "complete":
            self.hub.parts[oid, int(rest[0])] = body
            return self._answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if rest:
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(self.hub.parts[oid, number] for number in numbers)
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "The content has another digest")
        self.hub.large[oid] = body
        return self._json({})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self._writable(name)
        header, *operations = lines
        with self.hub.lock:
            if header["value"].get("parentCommit", repo.head) != repo.head:
                raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.files)
            for operation in operations:
                self._apply(files, operation["key"], operation["value"])
            commit = repo.commit(files)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise _Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            files[path] = Blob(self.hub.large[value["oid"]], large=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise _Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        found = self._readable(repo)
        blob = self._at(found, revision).get(file)
        if blob is None:
            raise _Refusal(404, f"{file} does not exist", "EntryNotFound")
        said = {"X-Repo-Commit": found.head, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        self._answer(200, blob.content, said)
