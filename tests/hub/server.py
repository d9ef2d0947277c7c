"""The part of the Hub's interface that pushing and opening models takes, in memory; large files go by Git LFS."""

import asyncio
import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

WRITER, READER = "hf_writerwriterwriterwriterwriter00", "hf_readerreaderreaderreaderreader00"
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """Its branches, and what each of its commits holds."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit


def oid(path: str, data: bytes) -> str:
    """What the Hub calls a file's content: as Git does, or as LFS does."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Repositories, large files, and every request that came.

    Attributes:
        before: Called with the number of each request (from 1 on); what it returns is the answer, as a status or
            whole, and 0 is none at all: the connection ends.
        after: The same, once the request was carried out.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.message = "refused by the test"
        self.before: Callable[[int], int | Response | None] = lambda number: None
        self.after: Callable[[int], int | Response | None] = lambda number: None
        self.address = ""

    def find(self, name: str, request: Request, revision: str | None = None, write: bool = False) -> Repository:
        """A repository that whoever asks may see, or write to."""
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
        if token and token not in (WRITER, READER):
            raise HTTPException(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not token):
            raise HTTPException(404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        if write and token != WRITER:
            raise HTTPException(403, headers={"X-Error-Message": "you have no right to write here"})
        if revision and unquote(revision) not in (*repository.branches, *repository.commits):
            raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound"})
        return repository

    def files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repository.branches.get(unquote(revision), revision)
        return commit, repository.commits[commit]


def build(hub: Hub) -> FastAPI:
    """The routes."""
    app = FastAPI()
    for add in (_add_writing, _add_large_files, _add_reading):
        add(app, hub)
    return app


def _add_writing(app: FastAPI, hub: Hub) -> None:
    @app.post("/api/repos/create")
    async def create(request: Request) -> dict[str, str]:
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        if request.headers.get("authorization") != f"Bearer {WRITER}" or asked["organization"] == "foreign":
            raise HTTPException(403, headers={"X-Error-Message": "you have no right to make repositories here"})
        if name in hub.repositories:
            raise HTTPException(409, headers={"X-Error-Message": "it is there already"})
        hub.repositories[name] = Repository(asked.get("visibility") == "private")
        hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{hub.address}/{name}"}

    @app.post("/api/validate-yaml")
    async def validate_yaml() -> dict[str, list[str]]:
        return {"errors": [], "warnings": []}

    @app.post("/api/models/{owner}/{name}/branch/{branch}")
    async def create_branch(owner: str, name: str, branch: str, request: Request) -> dict[str, str]:
        start = (await request.json())["startingPoint"]
        repository = hub.find(f"{owner}/{name}", request, start, write=True)
        repository.branches[unquote(branch)] = repository.branches.get(start, start)
        return {}

    @app.post("/api/models/{owner}/{name}/preupload/{branch}")
    async def preupload(owner: str, name: str, branch: str, request: Request) -> dict[str, Any]:
        _, held = hub.files(hub.find(f"{owner}/{name}", request, branch, write=True), branch)
        return {"files": [_upload_mode(file["path"], held) for file in (await request.json())["files"]]}

    @app.post("/api/models/{owner}/{name}/commit/{branch}")
    async def commit(owner: str, name: str, branch: str, request: Request) -> dict[str, Any]:
        repository = hub.find(f"{owner}/{name}", request, branch, write=True)
        head, held = hub.files(repository, branch)
        files = dict(held)
        for item in map(json.loads, (await request.body()).splitlines()):
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (None, head):
                raise HTTPException(412, headers={"X-Error-Message": "A commit has happened since"})
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        new = repository.commit(unquote(branch), files)
        return {"success": True, "commitOid": new, "commitUrl": f"{hub.address}/{owner}/{name}/commit/{new}"}


def _upload_mode(path: str, held: dict[str, bytes]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    known = {"oid": oid(path, held[path])} if path in held else {}
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}


def _add_large_files(app: FastAPI, hub: Hub) -> None:
    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(owner: str, name: str, request: Request) -> dict[str, Any]:
        hub.find(f"{owner}/{name}", request, write=True)
        objects = []
        for asked in (await request.json())["objects"]:
            place = f"{hub.address}/lfs/{asked['oid']}"
            actions = {"upload": {"href": f"{place}?signature=secret"}, "verify": {"href": f"{place}/verify"}}
            objects.append({**asked, **({} if asked["oid"] in hub.large else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/{name}")
    async def put(name: str, request: Request) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != name:
            raise HTTPException(400)
        hub.large[name] = data
        return Response()

    @app.post("/lfs/{name}/verify")
    async def verify(name: str, request: Request) -> Response:
        size = (await request.json())["size"]
        return Response(status_code=200 if len(hub.large.get(name, b"")) == size else 404)


def _add_reading(app: FastAPI, hub: Hub) -> None:
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    @app.get("/api/models/{owner}/{name}")
    async def info(owner: str, name: str, request: Request, revision: str = "main") -> dict[str, Any]:
        repository = hub.find(f"{owner}/{name}", request, revision)
        commit, files = hub.files(repository, revision)
        return {
            "id": f"{owner}/{name}",
            "sha": commit,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    @app.get("/api/models/{owner}/{name}/tree/{revision}/{folder:path}")
    async def tree(owner: str, name: str, revision: str, request: Request, folder: str = "") -> list[dict[str, Any]]:
        _, files = hub.files(hub.find(f"{owner}/{name}", request, revision), revision)
        found = {path: data for path, data in sorted(files.items()) if path.startswith(folder)}
        if not found:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound"})
        return [{"type": "file", "path": p, "size": len(data), "oid": oid(p, data)} for p, data in found.items()]

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, revision: str, path: str, request: Request) -> Response:
        commit, files = hub.files(hub.find(f"{owner}/{name}", request, revision), revision)
        if path not in files:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(path, data)}"', "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)


class Door:
    """Counts requests, and lets a test refuse them, or end the connection, before or after they are carried out."""

    def __init__(self, app: FastAPI, hub: Hub) -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.hub.calls.append(f"{scope['method']} {scope['path']}")
        number, answer = len(self.hub.calls), []

        async def keep(message: Any) -> None:
            answer.append(message)

        status = await asyncio.to_thread(self.hub.before, number)
        if status is None:
            # Undecoded: the name of a branch may have a slash in it.
            await self.app({**scope, "path": scope["raw_path"].decode()}, receive, keep)
            status = await asyncio.to_thread(self.hub.after, number)
        if status is None:
            for message in answer:
                await send(message)
        elif status == 0:  # an answer that never comes; the server ends the connection
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        elif isinstance(status, Response):
            await status(scope, receive, send)
        else:
            await JSONResponse({"error": self.hub.message}, status)(scope, receive, send)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub at an address of this machine."""
    hub = Hub()
    settings = uvicorn.Config(Door(build(hub), hub), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    hub.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
