"""Each peer as a pair of sidecars, one worker each: the client's on the first CPU, the server's on the last.

Every starter takes its certificates from the world's agent, and every pair is checked with 1 MiB byte for byte before it is
measured. `facts` holds what a pair says of its own handshakes, so that nobody has to believe what was compared. A pair that
cannot be had in some kind raises `NotApplicable`, which is reported and is no failure; what does not start raises `Failure`.
"""

import dataclasses
import json
import os
import re
import resource
import socket
import ssl
import subprocess
import time

from . import account, envoy
from .base import CONSUL, ENVOY, Failure, get, is_listening, put, secret, wait_for
from .world import BLOB_KEY, CONNECTIONS_MAX, ask_redis, blob, harness

PROBES = 12
TICKET_WAIT_S = 0.3
# Open files of HAProxy that are no connections: listeners, pipes, epoll.
FILES_SPARE = 250
CONSUL_TIMEOUT_S = 60
CONNECT_HELP_FLAG = "--tls-resumption"


class NotApplicable(Exception):
    """This peer has no such thing; the text says why."""


@dataclasses.dataclass
class Sidecar:
    """One process and what it serves: services by name, or None for all."""

    program: object
    role: str
    services: tuple | None = None


@dataclasses.dataclass
class Pair:
    """Two sidecars, or several where one process carries one service: where clients dial, and what is known of them."""

    peer: str
    kind: str
    dial: dict
    sidecars: list
    admin: dict = dataclasses.field(default_factory=dict)
    facts: dict = dataclasses.field(default_factory=dict)
    rotate: object = None
    programs: list = dataclasses.field(default_factory=list)

    def port(self, service, client="client"):
        return self.dial[(client, service)]

    def pids(self, service=None):
        """All processes; or those alone that `service` goes through."""
        found = []
        for sidecar in self.sidecars:
            sidecar.program.check_alive()
            if service is None or sidecar.services is None or service in sidecar.services:
                found += account.family(sidecar.program.process.pid)
        return found

    def check_alive(self):
        for sidecar in self.sidecars:
            sidecar.program.check_alive()

    def all_programs(self):
        return [sidecar.program for sidecar in self.sidecars] + self.programs


class Starter:
    """Starts pairs. Holds what all of them need."""

    def __init__(self, programs, ports, folder, binary, worlds):
        self.programs, self.ports, self.folder, self.binary, self.worlds = programs, ports, folder, binary, worlds
        cpus = sorted(os.sched_getaffinity(0))
        self.cpus = {"client": {cpus[0]}, "server": {cpus[-1]}}
        self.number = 0

    def start(self, peer, kind):
        """A running pair that has carried a payload byte for byte."""
        self.number += 1
        if kind in PEERS[peer].cannot:
            raise NotApplicable(PEERS[peer].cannot[kind])
        pair = PEERS[peer].start(self, self.worlds(kind), kind)
        self.check(pair)
        return pair

    def new_folder(self, name):
        folder = self.folder / f"{name}-{self.number}"
        folder.mkdir()
        return folder

    def launch(self, name, role, command, **more):
        return self.programs.start(f"{name} {role}", command, self.cpus[role], **more)

    def check(self, pair):
        """1 MiB out of redis arrives through the pair as it is; where redis is not carried, an accepted connection must do."""
        # Without a proxy there is no program to blame: whoever waits watches the agent, which every world has.
        program = pair.sidecars[0].program if pair.sidecars else self.worlds(pair.kind).agent
        if ("client", "cache") not in pair.dial:
            for port in pair.dial.values():
                wait_for(f"port {port} of the {pair.peer} pair", program, lambda port=port: is_listening(port))
            return
        port, wanted = pair.port("cache"), blob()
        wait_for(f"`cache` through the {pair.peer} pair", program, lambda: ask_redis(port, "GET", BLOB_KEY) is not None)
        if ask_redis(port, "GET", BLOB_KEY) != wanted:
            raise Failure(f"the {pair.peer} pair ({pair.kind}) does not carry {len(wanted)} bytes unchanged; it is not measured")
        pair.facts["payload"] = f"{len(wanted)} bytes through `cache` unchanged"


# --- ringfence ----------------------------------------------------------------------------------------------------------------


def start_ringfence(starter, world, kind):
    more = []
    if kind == "full":
        if has_resumption_flag(starter.binary):
            more = ["-tls-resumption", "off"]
    names = (("client", world.clients), ("server", sorted(world.services)))
    pair = Pair("ringfence", kind, dict(world.dial), [])
    for role, services in names:
        port = starter.ports.take()
        command = [starter.binary, "connect", "-http-addr", f"127.0.0.1:{world.port}", "-workers", 1, "-connection-log", "none", "-drain-time", "1s"]
        command += ["-admin-bind", f"127.0.0.1:{port}", "-log-level", "warn", *more]
        for service in services:
            command += ["-sidecar-for", service]
        program = starter.launch(f"ringfence {kind}", role, command)
        pair.sidecars.append(Sidecar(program, role))
        pair.admin[role] = port
        wait_for(program.name, program, lambda port=port: get(port, "/ready").startswith("LIVE"))
    files = world.files(world.clients[0])
    pair.facts["tls"] = probe_tls(world.public[world.services[0]], files["both"], files["roots"])
    if kind == "rotation":
        pair.rotate = lambda: put(world.port, "/v1/connect/ca/rotate")
    return pair


def has_resumption_flag(binary):
    done = subprocess.run([binary, "connect", "--help"], capture_output=True, text=True, check=False)
    return CONNECT_HELP_FLAG in done.stdout


def ringfence_handshakes(pair):
    total = resumed = 0
    versions = {}
    for line in get(pair.admin["server"], "/metrics").splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("ringfence_handshakes_resumed_total"):
            resumed += float(value)
        elif name.startswith("ringfence_handshakes_total"):
            total += float(value)
        version = re.search(r'version="([^"]+)"', name)
        if name.startswith("ringfence_handshakes") and version and float(value):
            versions[version[1]] = versions.get(version[1], 0) + int(float(value))
    return {"handshakes": int(total), "resumed": int(resumed), "versions": versions}


def ringfence_rotations(pair):
    for line in get(pair.admin["server"], "/metrics").splitlines():
        if line.startswith("ringfence_snapshot_generation "):
            return int(float(line.split()[-1]))
    return 0


# --- Envoy --------------------------------------------------------------------------------------------------------------------


def start_envoy(starter, world, kind, tls13=False):
    peer = "envoy13" if tls13 else "envoy"
    folder = starter.new_folder(peer)
    trust, domain = world.trust()
    leaf = {name: world.leaf(name) for name in (*world.clients, *world.services)}
    resume = kind != "full"
    pair = Pair(peer, kind, {}, [])
    if kind == "rotation":
        write_secrets(world, folder, leaf, trust)
        certificate = lambda name: envoy.watched_certificate(folder, name)
        validation = lambda rules: envoy.watched_validation(folder, rules)
    else:
        certificate = lambda name: envoy.inline_certificate(leaf[name])
        validation = lambda rules: envoy.inline_validation(trust, rules)
    public = {name: starter.ports.take() for name in world.services}
    outbound, inbound = [], []
    for client in world.clients:
        for name in world.services:
            port = pair.dial[(client, name)] = starter.ports.take()
            sni = f"{name}.default.dc1.internal.{domain}"
            cluster = sni if len(world.clients) == 1 else f"{client}.{sni}"
            tls = envoy.upstream_tls(certificate(client), validation(envoy.exact_uri(name, domain)), sni, resume, tls13)
            outbound.append((envoy.listener(cluster, port, "OUTBOUND", cluster, []), envoy.upstream_cluster(cluster, public[name], tls)))
    for name, app in world.apps.items():
        tls = envoy.downstream_tls(certificate(name), validation({}), resume)
        sources = ["nobody"] if name == "denied" else world.clients
        inbound.append((envoy.listener(f"public_{name}", public[name], "INBOUND", f"local_{name}", [envoy.rbac(sources)], tls), envoy.static_cluster(f"local_{name}", app)))
    for role, resources in (("client", outbound), ("server", inbound)):
        port = starter.ports.take()
        file = folder / f"bootstrap-{role}.yaml"
        secret(file, json.dumps(envoy.bootstrap(f"{peer} {role}", port, resources), indent=1))
        command = [ENVOY, "--config-path", file, "--concurrency", 1, "--disable-hot-restart", "--log-level", "warning"]
        program = starter.launch(f"{peer} {kind}", role, command)
        pair.sidecars.append(Sidecar(program, role))
        pair.admin[role] = port
        wait_for(program.name, program, lambda port=port: get(port, "/ready") == "LIVE\n")
    if kind == "rotation":

        def rotate():
            put(world.port, "/v1/connect/ca/rotate")
            write_secrets(world, folder, {name: world.leaf(name) for name in leaf}, world.trust()[0])

        pair.rotate = rotate
    return pair


def write_secrets(world, folder, leaf, trust):
    """Roots first: a leaf of the new root must find it trusted."""
    secret(folder / "roots.json", json.dumps(envoy.secret_roots(trust)))
    for name, one in leaf.items():
        secret(folder / f"{name}.json", json.dumps(envoy.secret_certificate(name, one)))


def envoy_handshakes(pair):
    facts = {"handshakes": 0, "resumed": 0, "versions": {}}
    for line in get(pair.admin["server"], "/stats?filter=listener.*ssl").splitlines():
        name, _, value = line.partition(": ")
        key = name.partition(".ssl.")[2]
        if not value.isdigit() or not int(value):
            continue
        if key == "handshake":
            facts["handshakes"] += int(value)
        elif key == "session_reused":
            facts["resumed"] += int(value)
        elif key.startswith("versions."):
            version = key.removeprefix("versions.")
            facts["versions"][version] = facts["versions"].get(version, 0) + int(value)
    return facts


def envoy_rotations(pair):
    total = 0
    for line in get(pair.admin["server"], "/stats?filter=ssl_context_update_by_sds").splitlines():
        value = line.rpartition(": ")[2]
        total += int(value) if value.isdigit() else 0
    return total


# --- HAProxy ------------------------------------------------------------------------------------------------------------------


def start_haproxy(starter, world, kind, log=False):
    folder = starter.new_folder("haproxy")
    files = {name: world.files(name) for name in (*world.clients, *world.services)}
    pair = Pair("haproxy", kind, {}, [])
    public = {name: starter.ports.take() for name in world.services}
    full = kind == "full"
    sections = {"client": [], "server": []}
    for client in world.clients:
        for name in world.services:
            port = pair.dial[(client, name)] = starter.ports.take()
            mine, other = files[client], files[name]
            server = f"server mesh 127.0.0.1:{public[name]} ssl crt {mine['both']} ca-file {mine['roots']} verify required verifyhost {other['cn']}"
            server += f" sni str({other['cn']}) ssl-min-ver TLSv1.2" + (" no-ssl-reuse" if full else "")
            sections["client"].append(f"listen {client}-{name}\n bind 127.0.0.1:{port}\n {server}")
    for name, app in world.apps.items():
        bind = f"bind 127.0.0.1:{public[name]} ssl crt {files[name]['both']} ca-file {files[name]['roots']} verify required ssl-min-ver TLSv1.2"
        bind += " no-tls-tickets" if full else ""
        sources = ["nobody"] if name == "denied" else [files[client]["cn"] for client in world.clients]
        rule = f"tcp-request content reject unless {{ ssl_c_s_dn(cn) -m str {' '.join(sources)} }}"
        sections["server"].append(f"listen {name}\n {bind}\n {rule}\n server app 127.0.0.1:{app}")
    for role, parts in sections.items():
        file = folder / f"{role}.cfg"
        text = f"global\n nbthread 1\n maxconn {haproxy_connections()}\n" + (" tune.ssl.cachesize 0\n" if full else "")
        text += " log stdout format raw local0\n" if log else ""
        text += "defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
        text += ' log global\n log-format "%sslv %sslc resumed=%[ssl_fc_is_resumed]"\n' if log and role == "server" else ""
        secret(file, text + "\n".join(parts) + "\n")
        program = starter.launch(f"haproxy {kind}", role, ["haproxy", "-db", "-f", file])
        pair.sidecars.append(Sidecar(program, role))
    return ready(starter, pair, public)


def haproxy_connections():
    """As many as fit into the open files that are allowed, two each: it refuses to start with more."""
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_SPARE) // 2


def ready(starter, pair, public):
    """Waits until both sidecars listen."""
    for role, ports in (("client", pair.dial.values()), ("server", public.values())):
        program = next(sidecar.program for sidecar in pair.sidecars if sidecar.role == role)
        for port in ports:
            wait_for(f"{program.name} on port {port}", program, lambda port=port: is_listening(port))
    return pair


def probe_logged(start):
    """Facts of a peer without counters: a pair of the same configuration that also logs, a few connections, its log."""

    def probe(starter, kind):
        starter.number += 1
        pair = start(starter, starter.worlds(kind), kind, log=True)
        try:
            for _ in range(PROBES):
                wait_for("`cache`", pair.sidecars[0].program, lambda: ask_redis(pair.port("cache"), "PING"))
            time.sleep(0.2)
            server = pair.sidecars[1].program
            lines = [line.split() for line in server.log.read_text(errors="replace").splitlines() if "resumed=" in line]
            facts = {"handshakes": len(lines), "resumed": sum(line[2] in ("resumed=1", "resumed=r") for line in lines), "versions": {}}
            for version, *_ in lines:
                facts["versions"][version] = facts["versions"].get(version, 0) + 1
            return facts
        finally:
            starter.programs.stop(*pair.all_programs())

    return probe


# --- nginx --------------------------------------------------------------------------------------------------------------------


def start_nginx(starter, world, kind, log=False):
    folder = starter.new_folder("nginx")
    files = {name: world.files(name) for name in (*world.clients, *world.services)}
    pair = Pair("nginx", kind, {}, [])
    public = {name: starter.ports.take() for name in world.services}
    full = kind == "full"
    sections = {"client": [], "server": []}
    for client in world.clients:
        for name in world.services:
            port = pair.dial[(client, name)] = starter.ports.take()
            mine, other = files[client], files[name]
            sections["client"].append(
                f"server {{ listen 127.0.0.1:{port} backlog=4096; proxy_pass 127.0.0.1:{public[name]}; proxy_ssl on;\n"
                f" proxy_ssl_certificate {mine['cert']}; proxy_ssl_certificate_key {mine['key']}; proxy_ssl_trusted_certificate {mine['roots']};\n"
                f" proxy_ssl_verify on; proxy_ssl_verify_depth 3; proxy_ssl_name {other['cn']}; proxy_ssl_server_name on;\n"
                f" proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_ssl_session_reuse {'off' if full else 'on'}; }}"
            )
    for name, app in world.apps.items():
        mine = files[name]
        allowed = [] if name == "denied" else [files[client]["cn"] for client in world.clients]
        # A denied peer is sent to a port where nothing can listen: the stream module has no other rule by identity.
        rows = "".join(f' "CN={cn}" 127.0.0.1:{app};' for cn in allowed)
        sections["server"].append(
            f"map $ssl_client_s_dn $to_{name} {{ default 127.0.0.1:1;{rows} }}\n"
            f"server {{ listen 127.0.0.1:{public[name]} ssl backlog=4096; proxy_pass $to_{name};\n"
            f" ssl_certificate {mine['cert']}; ssl_certificate_key {mine['key']}; ssl_client_certificate {mine['roots']};\n"
            f" ssl_verify_client on; ssl_verify_depth 3; ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets {'off' if full else 'on'}; }}"
        )
    for role, parts in sections.items():
        file = folder / f"{role}.conf"
        access = "log_format facts '$ssl_protocol $ssl_cipher resumed=$ssl_session_reused'; access_log /dev/stdout facts;" if log and role == "server" else "access_log off;"
        secret(
            file,
            "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
            f"daemon off; worker_processes 1; user root; error_log stderr error; pid {folder}/{role}.pid;\n"
            f"events {{ worker_connections {CONNECTIONS_MAX // 2}; }}\nstream {{ {access} proxy_timeout 1h; proxy_connect_timeout 5s; map_hash_bucket_size 256;\n"
            + "\n".join(parts)
            + "\n}\n",
        )
        program = starter.launch(f"nginx {kind}", role, ["nginx", "-c", file, "-e", "stderr"])
        pair.sidecars.append(Sidecar(program, role))
    return ready(starter, pair, public)


# --- Consul's built-in proxy --------------------------------------------------------------------------------------------------


def start_consul(starter, world, kind):
    folder = starter.new_folder("consul")
    ports = {name: starter.ports.take() for name in ("http", "serf_lan", "server")}
    config = {
        "node_name": "bench", "datacenter": "dc1", "data_dir": str(folder / "data"), "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1",
        "log_level": "warn", "disable_update_check": True, "server": True, "bootstrap_expect": 1, "connect": {"enabled": True},
        "performance": {"raft_multiplier": 1}, "ports": ports | {"serf_wan": -1, "dns": -1, "grpc": -1},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    agent = starter.programs.start("consul agent", [CONSUL, "agent", "-config-file", folder / "config.json"])
    http = ports["http"]
    pair = Pair("consul", kind, {}, [], programs=[agent])
    # Before the CA is up, asking for its configuration makes a 1.8.7 server panic; roots are safe to ask for.
    wait_for("Consul's CA", agent, lambda: json.loads(get(http, "/v1/agent/connect/ca/roots"))["TrustDomain"], CONSUL_TIMEOUT_S)
    wait_for("Consul's catalog", agent, lambda: json.loads(get(http, "/v1/catalog/nodes")), CONSUL_TIMEOUT_S)
    pair.dial = {("client", name): starter.ports.take() for name in world.services}
    public = {name: starter.ports.take() for name in ("client", *world.services)}
    upstreams = [{"DestinationName": name, "LocalBindAddress": "127.0.0.1", "LocalBindPort": port} for (_, name), port in pair.dial.items()]
    for name, port in (("client", starter.ports.take()), *world.apps.items()):
        sidecar = {"Address": "127.0.0.1", "Port": public[name], "Check": {"Name": "Measured", "TTL": "24h", "Status": "passing"}}
        sidecar["Proxy"] = {"Upstreams": upstreams if name == "client" else []}
        put(http, "/v1/agent/service/register", json.dumps({"Name": name, "Address": "127.0.0.1", "Port": port, "Connect": {"SidecarService": sidecar}}).encode())
    for name in world.services:
        rule = {"SourceName": "client", "DestinationName": name, "SourceType": "consul", "Action": "deny" if name == "denied" else "allow"}
        put(http, "/v1/connect/intentions", json.dumps(rule).encode(), "POST")
    for name in (*world.services, "client"):
        role = "client" if name == "client" else "server"
        command = [CONSUL, "connect", "proxy", "-sidecar-for", name, "-http-addr", f"127.0.0.1:{http}", "-log-level", "warn"]
        program = starter.launch(f"consul proxy {name}", role, command, more={"GOMAXPROCS": "1"})
        pair.sidecars.append(Sidecar(program, role, None if name == "client" else (name,)))
    for name, port in public.items():
        if name != "client":
            program = next(sidecar.program for sidecar in pair.sidecars if sidecar.services == (name,))
            wait_for(program.name, program, lambda port=port: is_listening(port), CONSUL_TIMEOUT_S)
    pair.sidecars.insert(0, pair.sidecars.pop())
    for port in pair.dial.values():
        wait_for("the client's proxy", pair.sidecars[0].program, lambda port=port: is_listening(port), CONSUL_TIMEOUT_S)
    leaf, roots = (json.loads(get(http, path)) for path in ("/v1/agent/connect/ca/leaf/client", "/v1/agent/connect/ca/roots"))
    for name, text in (("probe.pem", leaf["CertPEM"] + leaf["PrivateKeyPEM"]), ("roots.pem", "".join(root["RootCert"] for root in roots["Roots"]))):
        secret(folder / name, text)
    pair.facts["tls"] = probe_tls(public[world.services[0]], folder / "probe.pem", folder / "roots.pem")
    return pair


def probe_tls(port, certificate, roots):
    """What a TLS client with this certificate gets at the server's sidecar, in two connections, the second asking to resume."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(roots)
    context.load_cert_chain(certificate)
    session, reused = None, False
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain, session=session) as stream:
            version, cipher = stream.version(), stream.cipher()[0]
            stream.sendall(b"PING\r\n")
            stream.settimeout(TICKET_WAIT_S)
            try:
                stream.recv(64)  # with TLS 1.3 tickets come after the handshake
            except TimeoutError:
                pass
            session, reused = stream.session, stream.session_reused
    return {"version": version, "cipher": cipher, "server_resumes": reused}


# --- yardsticks of this tree --------------------------------------------------------------------------------------------------


def start_direct(_starter, world, kind):
    return Pair("direct", kind, {(client, name): port for client in world.clients for name, port in world.apps.items()}, [])


def start_relays(engine, peer):
    def start(starter, world, kind):
        binary = harness("bench-relay")
        pair = Pair(peer, kind, {}, [])
        tls = engine != "uring"
        files = {name: world.files(name) for name in ("client", *world.services)} if tls else {}
        public = {}
        for name, app in world.apps.items():
            if name == "denied":
                continue  # it has no intentions
            pair.dial[("client", name)], public[name] = starter.ports.take(), starter.ports.take()
            ends = (("server", "accept", public[name], app, name, "client"), ("client", "dial", pair.dial[("client", name)], public[name], "client", name))
            for role, direction, listen, to, mine, other in ends:
                command = [binary, "--engine", engine, "--listen", f"127.0.0.1:{listen}", "--to", f"127.0.0.1:{to}"]
                if tls:
                    one = files[mine]
                    command += ["--tls", direction, "--cert", one["cert"], "--key", one["key"], "--roots", one["roots"], "--expect-uri", files[other]["uri"]]
                program = starter.launch(f"{peer} {name}", role, command)
                pair.sidecars.append(Sidecar(program, role, (name,)))
                wait_for(program.name, program, lambda port=listen: is_listening(port))
        pair.sidecars.sort(key=lambda sidecar: sidecar.role)
        if tls:
            pair.facts["tls"] = probe_tls(public[world.services[0]], files["client"]["both"], files["client"]["roots"])
        return pair

    return start


# --- the list -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    """`counted` reads handshakes from a pair's own counters; `probed` from a logging pair; neither: `facts["tls"]` says it."""

    start: object
    title: str
    checks: str
    counted: object = None
    probed: object = None
    rotations: object = None
    resumes: bool = True
    cannot: dict = dataclasses.field(default_factory=dict)  # kind of pair to the reason why it has none


RELOADS = {"rotation": "it reads certificates at start; a change is a reload, and no agent brings one"}
OWN_CA = {
    "identities": "it is one process a service: fifty identities are fifty processes, not one worker",
    "rotation": "the rotation measured is the embedded agent's; a real Consul limits how often its CA may be replaced",
}
NO_AGENT = {"identities": "a yardstick has one identity for its whole life", "rotation": "a yardstick has one certificate for its whole life"}

PEERS = {
    "ringfence": Peer(start_ringfence, "ringfence of this tree", "chain and exact SPIFFE URI at the client; intention by SPIFFE identity at the server", ringfence_handshakes, None, ringfence_rotations),
    "envoy": Peer(start_envoy, "Envoy as Consul configures it: TLS 1.2 to upstreams", "chain and exact SPIFFE URI at the client; RBAC by SPIFFE identity at the server", envoy_handshakes, None, envoy_rotations),
    "envoy13": Peer(lambda *a: start_envoy(*a, tls13=True), "the same with TLS 1.3 to upstreams, which Consul does not", "as envoy", envoy_handshakes, None, envoy_rotations),
    "haproxy": Peer(start_haproxy, "HAProxy, mode tcp, nbthread 1", "chain and common name at the client, reject by common name at the server: it cannot match a URI SAN", None, probe_logged(start_haproxy), cannot=RELOADS),
    "nginx": Peer(start_nginx, "nginx, stream, one worker process", "chain and common name at the client, target mapped by common name at the server: it cannot match a URI SAN", None, probe_logged(start_nginx), cannot=RELOADS),
    "consul": Peer(start_consul, "Consul's built-in proxy, agent 1.8.7, GOMAXPROCS=1, certificates of its own CA, no ACLs", "chain and exact SPIFFE URI at the client; an authorize call to the agent for each connection, whose CPU in the agent is not counted", resumes=False, cannot=OWN_CA),
    "direct": Peer(start_direct, "no proxy at all", "nothing", cannot={"rotation": "there is no certificate"}),
    "floor": Peer(start_relays("uring", "floor"), "plaintext relays on the io-uring crate", "nothing: no TLS", cannot=NO_AGENT),
    "tokio-uring": Peer(start_relays("tokio-uring", "tokio-uring"), "relays on tokio-uring with rustls", "chain and exact SPIFFE URI on both sides", cannot=NO_AGENT),
    "tokio": Peer(start_relays("tokio", "tokio"), "relays on tokio with tokio-rustls", "chain and exact SPIFFE URI on both sides", cannot=NO_AGENT),
}  # fmt: skip
YARDSTICKS = ("direct", "floor", "tokio-uring", "tokio")
REFERENCE = "envoy"
OURS = "ringfence"
