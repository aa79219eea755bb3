"""A stand-in for the Hugging Face hub: as much of its protocol as downloads and uploads need, over a folder's files."""

import base64
import hashlib
import http.server
import json

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The repository org/name over the files of one folder. Whoever says that he is "owner" may write."""

    folder = None
    requests: list[str]
    objects: dict[str, bytes]  # large files by their digests, before a commit names them
    is_full = False  # and takes no more objects

    def log_message(self, *args) -> None:
        self.requests.append(self.path)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        names = [file.relative_to(self.folder).as_posix() for file in files]
        if path.startswith("/api/models/org/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.digest(file)}
                for name, file in zip(names, files, strict=True)
            ]
            self.send(json.dumps(entries).encode(), with_body)
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in names]
            self.send(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and path.split("/", 5)[5] in names:
            file = self.folder / path.split("/", 5)[5]
            self.send(file.read_bytes(), with_body, {"ETag": f'"{self.digest(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self.send(b"", with_body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def digest(self, file) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send(self, data: bytes, with_body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        path = self.path.split("?")[0]
        token = self.headers["Authorization"]
        if token != "Bearer owner":
            self.send(b"{}", True, status=403 if token == "Bearer reader" else 401)
        elif path == "/api/repos/create":
            taken = self.folder.exists()
            self.folder.mkdir(exist_ok=True)
            address = f"http://{self.headers['Host']}/org/name"
            self.send_json({"url": address, "error": "taken"}, status=409 if taken else 200)
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path == "/api/models/org/name/preupload/main":
            large = (".safetensors", ".gguf", ".pt2")
            files = [
                {"path": name, "uploadMode": "lfs" if name.endswith(large) else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in json.loads(body)["files"])
            ]
            self.send_json({"files": files})
        elif path == "/org/name.git/info/lfs/objects/batch":
            objects = [
                one | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": objects})
        else:
            assert path == "/api/models/org/name/commit/main"
            for line in body.splitlines():
                self.commit(json.loads(line))
            self.send_json(
                {"commitUrl": f"http://{self.headers['Host']}/org/name/commit/{COMMIT}", "commitOid": COMMIT}
            )

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_full:
            self.objects[self.path.split("/")[-1]] = data
        self.send(b"", True, status=507 if self.is_full else 200)

    def commit(self, change: dict) -> None:
        value = change["value"]
        if change["key"] == "file":
            (self.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
        elif change["key"] == "lfsFile":
            (self.folder / value["path"]).write_bytes(self.objects[value["oid"]])

    def send_json(self, value: dict, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), True, {"Content-Type": "application/json"}, status)

    def chunks(self) -> bytes:
        """A body whose length nobody told."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
