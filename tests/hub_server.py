"""A stand-in of the Hugging Face Hub on this machine: what its HTTP API answers to downloads and commits.

The whole of huggingface_hub runs against it, its HTTP client included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_owner"


@dataclass
class Hub:
    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each repository."""
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    read_only: bool = False
    commits: list[str] = field(default_factory=list)
    """Their messages."""

    def commit_of(self, repository: str) -> str:
        """What stands for the commit of its files as they are."""
        return hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Within the `with` block there is a Hub at its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: object = b"", status: int = 200, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, code: str, status: int = 404) -> None:
            self.answer({"error": code}, status, X_Error_Code=code)

        def repository(self) -> str | None:
            """The one that is asked for; None if it is not there, or may not be seen, which has been answered."""
            owner, name = self.path.removeprefix("/api/models").strip("/").split("/")[:2]
            repository = f"{owner}/{name}"
            is_owner = self.headers.get("authorization") == f"Bearer {TOKEN}"
            if repository not in hub.files or (repository in hub.private and not is_owner):
                self.missing("RepoNotFound", 404 if is_owner else 401)
            elif repository in hub.gated and not is_owner:
                self.missing("GatedRepo", 403)
            else:
                return repository
            return None

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if (repository := self.repository()) is None:
                return
            files, commit = hub.files[repository], hub.commit_of(repository)
            if "/resolve/" in path:
                revision, _, file = path.partition("/resolve/")[2].partition("/")
                if revision not in ("main", commit):
                    self.missing("RevisionNotFound")
                elif file not in files:
                    self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                else:
                    tag = hashlib.sha1(files[file]).hexdigest()
                    self.answer(files[file], ETag=f'"{tag}"', X_Repo_Commit=commit)
            elif "/tree/" in path:
                self.answer(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for file, content in files.items()
                    ]
                )
            else:
                siblings = [{"rfilename": file} for file in files]
                self.answer({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.headers.get("authorization") != f"Bearer {TOKEN}" or hub.read_only:
                self.answer({"error": "forbidden"}, 403)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                is_new = name not in hub.files
                hub.files.setdefault(name, {})
                is_private = asked.get("private") or asked.get("visibility") == "private"  # older, newer
                hub.private |= {name} if is_private else set()
                self.answer({"url": f"{hub.address}/{name}"}, 200 if is_new else 409)
            elif (repository := self.repository()) is None:
                return
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                self.answer(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.commits.append(value["summary"])
                    elif line["key"] == "deletedFile":
                        del hub.files[repository][value["path"]]
                    else:
                        hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                commit = hub.commit_of(repository)
                self.answer({"commitUrl": f"{hub.address}/{repository}/commit/{commit}", "commitOid": commit})
            else:
                self.answer({"error": self.path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
