"""A small Hugging Face Hub on the loopback: repositories, metadata check, LFS batch, storage and commits, over HTTP.

It speaks the part of the protocol that ``HfApi.create_repo`` and ``HfApi.create_commit`` of huggingface_hub use without
Xet, checks tokens and hashes, keeps what it receives, and fails where a test asks it to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LFS_BYTES = 2000
"""Files from this size go through LFS, as .safetensors of any size do."""


@dataclass
class Repository:
    """One repository and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Request:
    """What one request looked like."""

    method: str
    path: str
    authorization: str | None


class Hub:
    """A running server.

    Attributes:
        endpoint: Its address.
        token: The one token it accepts.
        repositories: By id.
        requests: Everything asked of it, in order.
        faults: Path suffix to the HTTP status with which such requests are refused.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, int] = {}
        self.storage: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON content of an authorised request."""
        parts = path.strip("/").split("/")
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if (method, path) == ("POST", "/api/validate-yaml"):
            return self._validate(json.loads(body)["content"])
        if method == "GET" and parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]))
        if method == "POST" and parts[:2] == ["api", "models"] and parts[4:] == ["preupload", "main"]:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self._mode(f), "shouldIgnore": False} for f in files]
            return 200, {"files": modes}
        if method == "POST" and path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._actions(o) for o in json.loads(body)["objects"]]}
        if method == "POST" and path == "/lfs/verify":
            return self._verify(json.loads(body))
        if method == "POST" and parts[:2] == ["api", "models"] and parts[4:] == ["commit", "main"]:
            return self._commit("/".join(parts[2:4]), body)
        return 404, {"error": f"no such address: {method} {path}"}

    def put(self, oid: str, body: bytes) -> int:
        """Store an object, as the storage behind the Hub does: without a token, by hash."""
        if hashlib.sha256(body).hexdigest() != oid:
            return 400
        self.storage[oid] = body
        return 200

    def _create(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repo_id = f"{request['organization']}/{request['name']}"
        known = repo_id in self.repositories
        self.repositories.setdefault(repo_id, Repository(private=request.get("visibility") == "private"))
        return (409 if known else 200), {"url": f"{self.endpoint}/{repo_id}", "error": "exists" if known else None}

    def _info(self, repo_id: str) -> tuple[int, dict[str, Any]]:
        if repo_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo_id, "private": self.repositories[repo_id].private}

    def _validate(self, content: str) -> tuple[int, dict[str, Any]]:
        if "license: not-a-licence" in content:
            return 400, {"errors": [{"message": '"license" must be one of apache-2.0, mit'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _mode(self, file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith(".safetensors") or file["size"] >= LFS_BYTES else "regular"

    def _actions(self, found: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.endpoint}/storage/{found['oid']}", "header": {}}
        return {**found, "actions": {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs/verify", "header": {}}}}

    def _verify(self, found: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(self.storage.get(found["oid"], b"")) != found["size"]:
            return 400, {"error": "not stored"}
        self.verified.add(found["oid"])
        return 200, {}

    def _commit(self, repo_id: str, body: bytes) -> tuple[int, dict[str, Any]]:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.verified:
                files[value["path"]] = self.storage[value["oid"]]
            else:
                return 400, {"error": f"not uploaded: {value['path']}"}
        repository = self.repositories[repo_id]
        repository.files.update(files)
        repository.messages.append(header["value"]["summary"])
        oid = f"{len(repository.messages):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PUT(self) -> None:
            self._serve("PUT")

        def log_message(self, *unused: object) -> None:
            """Keep the test's stderr for the program."""

        def _serve(self, method: str) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            authorization = self.headers.get("Authorization")
            hub.requests.append(Request(method, path, authorization))
            fault = next((status for suffix, status in hub.faults.items() if path.endswith(suffix)), None)
            if fault is not None:
                self._reply(fault, {"error": "a fault of this server"})
            elif method == "PUT" and path.startswith("/storage/"):
                self._reply(hub.put(path.removeprefix("/storage/"), body), {})
            elif authorization != f"Bearer {hub.token}":
                self._reply(401, {"error": "Invalid credentials in Authorization header"})
            else:
                self._reply(*hub.answer(method, path, body))

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            payload = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    return Handler
