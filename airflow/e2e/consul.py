"""Real Consul 1.8.7: one agent that is the server too, with ACLs that deny by default."""

from __future__ import annotations

import json
import subprocess
import uuid
from typing import Any

from e2e.http import Answer, ask
from e2e.install import CACHE
from e2e.machine import Failure, Machine, wait

HTTP, RPC, SERF = 18500, 18300, 18301
BINARY = CACHE / "consul-1.8.7/usr/bin/consul"


class Consul:
    """The agent, spoken to with the management token."""

    def __init__(self, machine: Machine) -> None:
        self.address = f"127.0.0.1:{HTTP}"
        self.management = str(uuid.uuid4())
        self.machine = machine
        folder = machine.scratch / "consul"
        folder.mkdir()
        tokens = {"master": self.management, "agent": self.management}
        config = {
            "node_name": "e2e",
            "datacenter": "dc1",
            "data_dir": str(folder / "data"),
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "disable_update_check": True,
            "server": True,
            "bootstrap_expect": 1,
            "acl": {"enabled": True, "default_policy": "deny", "tokens": tokens},
            "connect": {"enabled": True},
            "performance": {"raft_multiplier": 1},
            "ports": {"http": HTTP, "serf_lan": SERF, "serf_wan": -1, "server": RPC, "dns": -1, "grpc": -1},
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.process = machine.start("consul", [BINARY, "agent", "-config-file", folder / "config.json"])
        wait("Consul is ready", 30, self._is_ready)

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Answer:
        """One request, whatever comes back."""
        return ask(f"http://{self.address}{path}", method, body, {"X-Consul-Token": self.management})

    def must(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """One request that has to succeed."""
        answer = self.ask(path, method, body)
        if answer.status != 200:
            raise Failure(f"Consul: {method} {path}: {answer.status} {answer.body}")
        return json.loads(answer.body) if answer.body.strip() else None

    def register(self, service: str, port: int, public: int) -> None:
        """A service with its sidecar, which counts as healthy as soon as it listens."""
        check = {"Name": "sidecar listens", "TCP": f"127.0.0.1:{public}", "Interval": "1s"}
        sidecar = {"Port": public, "Checks": [check]}
        self.must("/v1/agent/service/register", "PUT", {"Name": service, "Port": port, "Connect": {"SidecarService": sidecar}})

    def token_of(self, service: str) -> str:
        """A token that may be this service and nothing else."""
        return self._token({"ServiceIdentities": [{"ServiceName": service}]})

    def token_by(self, policy: str, rules: str) -> str:
        """A token with these rules."""
        self.must("/v1/acl/policy", "PUT", {"Name": policy, "Rules": rules})
        return self._token({"Policies": [{"Name": policy}]})

    def allow(self, source: str, destination: str) -> None:
        """An intention."""
        body = {"SourceName": source, "DestinationName": destination, "SourceType": "consul", "Action": "allow"}
        self.must("/v1/connect/intentions", "POST", body)

    def has_endpoint(self, service: str) -> bool:
        """Whether a sidecar of the service is healthy."""
        return bool(self.must(f"/v1/health/connect/{service}?passing"))

    def rotate_ca(self) -> str:
        """A new key makes a new root. Gives the id of the new one."""
        command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-outform", "PEM"]
        pkcs8 = subprocess.run(command, check=True, capture_output=True).stdout
        key = subprocess.run(["openssl", "ec"], input=pkcs8, check=True, capture_output=True).stdout.decode()
        before = self.root()
        config = {"Provider": "consul", "Config": {"LeafCertTTL": "72h", "PrivateKey": key, "RootCert": ""}}
        self.must("/v1/connect/ca/configuration", "PUT", config)
        wait("a new root is active", 30, lambda: self.root() != before)
        return self.root()

    def root(self) -> str:
        """The id of the active root."""
        return str(self.must("/v1/agent/connect/ca/roots")["ActiveRootID"])

    def _token(self, body: dict[str, Any]) -> str:
        return str(self.must("/v1/acl/token", "PUT", body)["SecretID"])

    def _is_ready(self) -> bool:
        self.process.assert_running()
        paths = ["/v1/acl/token/self", "/v1/agent/self"]
        if any(self.ask(path).status != 200 for path in paths):
            return False
        # Not /v1/connect/ca/configuration: before the CA is up, that question makes a 1.8.7 server panic.
        roots = self.ask("/v1/agent/connect/ca/roots")
        return roots.status == 200 and bool(roots.json().get("TrustDomain")) and len(self.must("/v1/catalog/nodes")) == 1
