"""A stand-in for the Hub's HTTP API: what huggingface_hub needs to push and pull a model.

Repositories, branches, commits, files in the commit and files through LFS (all `*.safetensors`), ETags,
tokens, private repositories, error headers. There is no Xet: clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch, files):
        parent = self.branches.get(branch, "")
        said = f"{parent} {len(self.commits)} {sorted(files)}"
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class HubError(Exception):
    def __init__(self, status, code=None, message="refused", **more):
        super().__init__(message)
        self.status, self.code, self.said = status, code, {"error": message, **more}


class Hub:
    """The server, on a free port of this machine; `requests` lists what it was asked, in order."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_one

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, like a CDN
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def publish(self, name, folder):
        """Publishes a folder as the next commit of a public repository, made if it does not exist."""
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.objects |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return self.repos.setdefault(name, Repo(private=False)).commit("main", files)

    def asked(self, method, pattern=""):
        return [path for verb, path in self.requests if verb == method and re.search(pattern, path)]

    def answer(self, call):
        url = urlsplit(call.path)
        body = call.rfile.read(int(call.headers.get("Content-Length") or 0))
        if "chunked" in call.headers.get("Transfer-Encoding", ""):
            body = _chunks(call.rfile)
        self.requests.append((call.command, unquote(url.path)))
        owner = call.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            status, headers, said = self.route(call.command, url.path, body, owner)
        except HubError as error:
            status, said = error.status, json.dumps(error.said).encode()
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers["X-Error-Message"] = str(error)
        call.send_response(status)
        for key, value in ({"Content-Length": str(len(said))} | headers).items():
            call.send_header(key, value)
        call.end_headers()
        if call.command != "HEAD":
            call.wfile.write(said)

    def route(self, method, path, body, owner):
        for verbs, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verbs.split():
                if method in ("POST", "PUT") and not owner and "/lfs/" not in path:
                    raise HubError(401, message="Invalid username or password.")
                return handle(self, body, owner, *map(unquote, match.groups()))
        raise HubError(404, message=f"the stand-in knows no {method} {path}")

    def find(self, name, owner, revision="main"):
        repo = self.repos.get(name)
        if repo is None or (repo.private and not owner):
            raise HubError(404 if owner else 401, "RepoNotFound", "Repository not found")
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    # --- requests ---

    def create(self, body, owner):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not asked["organization"] == "org":
            raise HubError(403, message="You don't have the rights to create a model there")
        if name in self.repos:
            url = f"{self.address}/{name}"
            raise HubError(409, message="You already created this model repo", url=url)
        self.repos[name] = Repo(asked.get("visibility") == "private")
        return _json({"url": f"{self.address}/{name}"})

    def branch(self, body, owner, name, branch):
        repo, sha = self.find(name, owner, json.loads(body or b"{}").get("startingPoint", "main"))
        if branch in repo.branches:
            raise HubError(409, message="Reference already exists")
        repo.branches[branch] = sha
        return _json({})

    def validate(self, body, owner):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        base = data.get("base_model", "org/name")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors = [{"message": f'"base_model" with value "{base}" is not valid'}]
            return _json({"errors": errors, "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def preupload(self, body, owner, name, revision):
        repo, sha = self.find(name, owner, revision)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _oid(repo.commits[sha].get(file["path"])),
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": modes})

    def batch(self, body, owner, name):
        self.find(name, owner)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.address}/lfs/{asked['oid']}"}
            actions = {} if asked["oid"] in self.objects else {"actions": {"upload": upload}}
            objects.append(asked | actions)
        return _json({"objects": objects, "transfer": "basic"})

    def put_object(self, body, owner, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="the bytes are not those of the oid")
        self.objects[oid] = body
        return 200, {}, b""

    def get_object(self, body, owner, oid):
        return 200, {"ETag": f'"{oid}"'}, self.objects[oid]

    def commit(self, body, owner, name, revision):
        repo, sha = self.find(name, owner, revision)
        files = dict(repo.commits[sha])
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert step["key"] == "header", step
        sha = repo.commit(revision, files)
        return _json({"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha})

    def info(self, body, owner, name, revision="main"):
        repo, sha = self.find(name, owner, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        said = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private}
        return _json(said | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body, owner, name, revision):
        repo, sha = self.find(name, owner, revision)
        entries = []
        for path, content in repo.commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            if path.endswith(".safetensors"):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 100}
            entries.append(entry)
        return _json(entries)

    def resolve(self, body, owner, name, revision, path):
        repo, sha = self.find(name, owner, revision)
        headers = {"X-Repo-Commit": sha}
        content = repo.commits[sha].get(path)
        if content is None:
            raise HubError(404, "EntryNotFound", f"Entry not found: {path}")
        if path.endswith(".safetensors"):
            oid = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return 302, headers | {"Location": f"{self.storage}/lfs/{oid}"}, b""
        return 200, headers | {"ETag": f'"{_oid(content)}"'}, content


def _json(said, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(said).encode()


def _oid(content):
    """The git object id of a blob."""
    if content is None:
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _chunks(stream):
    body = b""
    while size := int(stream.readline(), 16):
        body += stream.read(size)
        stream.readline()
    stream.readline()
    return body


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", Hub.branch),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/lfs/(\w+)", Hub.put_object),
    ("GET HEAD", r"/lfs/(\w+)", Hub.get_object),
    ("GET", rf"/api/models/{NAME}", Hub.info),
    ("GET", rf"/api/models/{NAME}/revision/([^/]+)", Hub.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", Hub.tree),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
)
