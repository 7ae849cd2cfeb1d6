"""The applications behind the sidecars, and the embedded agent that issues every certificate.

An application is started when the first workload needs it. A world is one agent with the services that one kind of pair
carries; its certificates serve ringfence, Envoy and all others alike. Fails with the last words of what did not start.
"""

import hashlib
import json
import os
import pathlib
import pwd
import random
import socket
import subprocess

from .base import HTTP_TIMEOUT_S, Failure, get, is_listening, secret, target, wait_for

PAYLOADS = (100, 4_096)
BLOB_KEY, BLOB_BYTES = "ringfence:blob", 1 << 20
CONNECTIONS_MAX = 65_536
HTTP_BODY_BYTES = 1_024
PG_SCALE = 1
PG_CONNECTIONS = 200
IDENTITIES = 50
# What each kind of pair carries. Fresh processes for `idle`, an agent of its own that rotates for `rotation`.
ALL = ("cache", "sink", "web", "db", "load", "denied")
SERVICES = {"main": ALL, "full": ("cache", "load"), "identities": ("load",), "idle": ("load",), "rotation": ("load",)}


def payload_key(size):
    return f"ringfence:{size}"


def blob():
    return random.Random(BLOB_BYTES).randbytes(BLOB_BYTES)


def ask_redis(port, *words):
    """One command and its reply, whole."""
    request = b"*%d\r\n" % len(words)
    for word in words:
        word = word if isinstance(word, bytes) else word.encode()
        request += b"$%d\r\n%s\r\n" % (len(word), word)
    with socket.create_connection(("127.0.0.1", port), HTTP_TIMEOUT_S) as connection:
        connection.sendall(request)
        reader = connection.makefile("rb")
        head = reader.readline()
        if not head.endswith(b"\r\n"):
            raise ValueError(f"port {port} closed the connection after {len(head)} bytes")
        if head.startswith(b"-"):
            raise ValueError(f"redis on port {port} says {head.decode().strip()}")
        if not head.startswith(b"$"):
            return head
        body = reader.read(int(head[1:]) + 2)
        if len(body) != int(head[1:]) + 2:
            raise ValueError(f"port {port} closed the connection after {len(body)} of {int(head[1:]) + 2} bytes")
        return body[:-2]


class Apps:
    """redis, iperf3, nginx, PostgreSQL and bench-load's server: each started once, on demand, and kept."""

    def __init__(self, programs, ports, folder):
        self.programs, self.folder = programs, folder
        self.port = {name: ports.take() for name in ALL}
        self.started = {}

    def need(self, name):
        """Starts the application of this service; what failed once fails again with the same words."""
        if name not in self.started:
            try:
                starts = {"cache": self.redis, "sink": self.iperf, "web": self.nginx, "db": self.postgres}
                starts.get(name, self.bench_load)(name, self.port[name])
                self.started[name] = None
            except (Failure, OSError) as error:
                self.started[name] = f"the application `{name}` does not start: {error}"
        if self.started[name]:
            raise Failure(self.started[name])

    def redis(self, _name, port):
        command = ["redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--maxclients", 4_096]
        server = self.programs.start("redis-server", command)
        wait_for("redis-server", server, lambda: all(ask_redis(port, "SET", payload_key(size), "x" * size) == b"+OK\r\n" for size in PAYLOADS))
        ask_redis(port, "SET", BLOB_KEY, blob())

    def iperf(self, _name, port):
        server = self.programs.start("iperf3 server", ["iperf3", "--server", "--bind", "127.0.0.1", "--port", port])
        wait_for("iperf3 server", server, lambda: is_listening(port))

    def nginx(self, _name, port):
        file = self.folder / "web.conf"
        file.write_text(
            f"daemon off; worker_processes 1; user root; error_log stderr warn; pid {self.folder}/web.pid;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n"
            + "".join(f" {kind}_temp_path {self.folder}/web-{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
            + f" server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 '{'x' * HTTP_BODY_BYTES}'; }} }} }}\n"
        )
        server = self.programs.start("nginx http", ["nginx", "-c", file, "-e", "stderr"])
        wait_for("nginx http", server, lambda: get(port, "/") == "x" * HTTP_BODY_BYTES)

    def postgres(self, _name, port):
        bins = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        if not bins:
            raise Failure("PostgreSQL is missing; run scripts/setup packages")
        folder, data, user = bins[-1].parent, self.folder / "pg" / "data", None
        data.parent.mkdir()
        if os.getuid() == 0:
            user = "postgres"
            account = pwd.getpwnam(user)
            self.folder.chmod(0o711)
            os.chown(data.parent, account.pw_uid, account.pw_gid)
        command = [folder / "initdb", "--pgdata", data, "--auth", "trust", "--username", "bench", "--no-sync", "--locale", "C.UTF-8"]
        self.programs.run("initdb", command, user=user)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off", "max_connections": PG_CONNECTIONS}
        command = [folder / "postgres", "-D", data]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        server = self.programs.start("postgres", command, user=user)
        wait_for("postgres", server, lambda: is_listening(port))
        self.programs.run("pgbench -i", ["pgbench", "-i", "-q", "-s", PG_SCALE, "-h", "127.0.0.1", "-p", port, "-U", "bench", "postgres"])

    def bench_load(self, name, port):
        server = self.programs.start(f"bench-load serve {name}", [bench_load(), "serve", "--bind", f"127.0.0.1:{port}"])
        wait_for(server.name, server, lambda: is_listening(port))


def bench_load():
    return harness("bench-load")


def harness(name):
    path = target() / "release" / name
    if not os.access(path, os.X_OK):
        raise Failure(f"{path} is missing; run cargo build --release -p ringfence-bench, whose errors say why it does not build")
    return path


class World:
    """One embedded agent with the services of one kind of pair, and the files of its certificates."""

    def __init__(self, programs, ports, folder, binary, apps, kind):
        self.kind, self.binary = kind, binary
        self.services = SERVICES[kind]
        self.clients = [f"client-{number:02}" for number in range(IDENTITIES)] if kind == "identities" else ["client"]
        self.apps = {name: apps.port[name] for name in self.services}
        self.folder = folder / f"world-{kind}"
        self.folder.mkdir()
        # Where the clients of ringfence dial: upstream (client, service) to port.
        self.dial = {(client, name): ports.take() for client in self.clients for name in self.services}
        self.public = {name: ports.take() for name in (*self.clients, *self.services)}
        listed = [registration(client, ports.take(), self.public[client], self.upstreams(client)) for client in self.clients]
        listed += [registration(name, port, self.public[name], []) for name, port in self.apps.items()]
        intentions = [
            {"source_name": client, "destination_name": name, "action": "deny" if name == "denied" else "allow"}
            for client in self.clients
            for name in self.services
        ]
        file = self.folder / "agent.json"
        file.write_text(json.dumps({"services": listed, "intentions": intentions}, indent=1))
        self.port = ports.take()
        command = [binary, "agent", "-config-file", file, "-bind", f"127.0.0.1:{self.port}", "-default-policy", "deny", "-log-level", "warn"]
        self.agent = programs.start(f"agent {kind}", command)
        wait_for("the embedded agent", self.agent, lambda: len(json.loads(get(self.port, "/v1/agent/services"))) >= len(listed) * 2)

    def upstreams(self, client):
        # Consul's limits of an upstream, which ringfence obeys as Envoy does; lifted here as they are there.
        limits = {"max_connections": CONNECTIONS_MAX, "max_pending_requests": CONNECTIONS_MAX, "max_concurrent_requests": CONNECTIONS_MAX}
        return [
            {"destination_name": name, "local_bind_address": "127.0.0.1", "local_bind_port": port, "config": {"limits": limits}}
            for (owner, name), port in self.dial.items()
            if owner == client
        ]

    def trust(self):
        """(all active roots as PEM, the trust domain)"""
        roots = json.loads(get(self.port, "/v1/agent/connect/ca/roots"))
        return "".join(root["RootCert"] for root in roots["Roots"]), roots["TrustDomain"]

    def leaf(self, service):
        return json.loads(get(self.port, f"/v1/agent/connect/ca/leaf/{service}"))

    def files(self, service):
        """PEM files of a service: certificate, key, both in one, roots; and the certificate's common name."""
        leaf, (trust, domain) = self.leaf(service), self.trust()
        files = {name: self.folder / f"{service}.{name}" for name in ("cert", "key", "both", "roots")}
        texts = {"cert": leaf["CertPEM"], "key": leaf["PrivateKeyPEM"], "both": leaf["CertPEM"] + leaf["PrivateKeyPEM"], "roots": trust}
        for name, text in texts.items():
            secret(files[name], text)
        subject = subprocess.run(
            ["openssl", "x509", "-noout", "-subject", "-nameopt", "sep_multiline,utf8", "-in", files["cert"]], capture_output=True, text=True, check=True
        ).stdout
        names = [line.strip().removeprefix("CN=") for line in subject.splitlines() if line.strip().startswith("CN=")]
        return files | {"cn": names[0], "uri": leaf["ServiceURI"], "domain": domain}


def registration(name, port, public, upstreams):
    # A check that nobody feeds for a day: no probe connects to one pair and not to the other.
    check = {"name": "Measured", "ttl": "24h", "status": "passing"}
    sidecar = {"address": "127.0.0.1", "port": public, "checks": [check], "proxy": {"upstreams": upstreams}}
    return {"name": name, "address": "127.0.0.1", "port": port, "connect": {"sidecar_service": sidecar}}


def digest(data):
    return hashlib.sha256(data).hexdigest()
