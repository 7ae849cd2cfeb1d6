"""Envoy's configuration as Consul generates it, as a static bootstrap.

TLS 1.2 towards upstreams unless `tls13`, one resumable session a cluster, exact URI SAN, client certificates required, network
RBAC by identity. Three things differ, for the measurement's sake: resumption can be off on both sides; certificates can come
from files that are watched, where Consul pushes them; and the limit of 1,024 connections a cluster, Envoy's default that
Consul leaves in force, is lifted, or 10,000 connections could not be held.
"""

from .world import CONNECTIONS_MAX

TYPE = "type.googleapis.com/envoy."
SECRET = TYPE + "extensions.transport_sockets.tls.v3.Secret"


def bootstrap(name, admin, resources):
    return {
        "admin": {"address": address(admin)},
        "node": {"id": name, "cluster": name},
        "static_resources": {"listeners": [pair[0] for pair in resources], "clusters": [pair[1] for pair in resources]},
    }


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def listener(name, port, direction, cluster, filters, tls=None):
    prefix = "public_listener" if direction == "INBOUND" else f"upstream.{name}"
    proxy = {"@type": TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": prefix, "cluster": cluster}
    chain = {"filters": [*filters, {"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
    if tls:
        chain["transport_socket"] = tls
    return {"name": name, "address": address(port), "traffic_direction": direction, "filter_chains": [chain]}


def rbac(sources):
    """Consul's layer 4 intentions: one principal for each source that may come in."""
    regexes = [f"^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{source}$" for source in sources]
    principals = [{"authenticated": {"principal_name": {"safe_regex": {"regex": regex}}}} for regex in regexes]
    policy = {"permissions": [{"any": True}], "principals": principals}
    rules = {"action": "ALLOW", "policies": {"consul-intentions-layer4": policy}}
    config = {"@type": TYPE + "extensions.filters.network.rbac.v3.RBAC", "rules": rules, "stat_prefix": "connect_authz"}
    return {"name": "envoy.filters.network.rbac", "typed_config": config}


def upstream_cluster(name, port, tls):
    return static_cluster(name, port) | {
        "outlier_detection": {},
        "common_lb_config": {"healthy_panic_threshold": {}},
        "transport_socket": tls,
    }


def static_cluster(name, port):
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]
    assignment = {"cluster_name": name, "endpoints": endpoints}
    limits = {"max_connections": CONNECTIONS_MAX, "max_pending_requests": CONNECTIONS_MAX, "max_requests": CONNECTIONS_MAX}
    breakers = {"thresholds": [limits]}
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "load_assignment": assignment, "circuit_breakers": breakers}


def common_tls(certificate, validation, params):
    return {"tls_params": params, **certificate, **validation}


def inline_certificate(leaf):
    return {"tls_certificates": [{"certificate_chain": {"inline_string": leaf["CertPEM"]}, "private_key": {"inline_string": leaf["PrivateKeyPEM"]}}]}


def inline_validation(trust, rules):
    return {"validation_context": {"trusted_ca": {"inline_string": trust}, **rules}}


def watched_certificate(folder, service):
    return {"tls_certificate_sds_secret_configs": [watched(folder, service)]}


def watched_validation(folder, rules):
    return {"combined_validation_context": {"default_validation_context": rules, "validation_context_sds_secret_config": watched(folder, "roots")}}


def watched(folder, name):
    source = {"path": str(folder / f"{name}.json"), "watched_directory": {"path": str(folder)}}
    return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}


def secret_certificate(name, leaf):
    """The text of a watched file that holds a certificate."""
    certificate = inline_certificate(leaf)["tls_certificates"][0]
    return {"resources": [{"@type": SECRET, "name": name, "tls_certificate": certificate}]}


def secret_roots(trust):
    return {"resources": [{"@type": SECRET, "name": "roots", "validation_context": {"trusted_ca": {"inline_string": trust}}}]}


def exact_uri(destination, domain):
    uri = f"spiffe://{domain}/ns/default/dc/dc1/svc/{destination}"
    return {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": uri}}]}


def upstream_tls(certificate, validation, sni, resume, tls13):
    params = {"tls_maximum_protocol_version": "TLSv1_3"} if tls13 else {}
    config = {"@type": TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": common_tls(certificate, validation, params)}
    config["sni"] = sni
    if not resume:
        config["max_session_keys"] = 0
    return {"name": "tls", "typed_config": config}


def downstream_tls(certificate, validation, resume):
    config = {"@type": TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext", "common_tls_context": common_tls(certificate, validation, {})}
    config["require_client_certificate"] = True
    if not resume:
        config |= {"disable_stateless_session_resumption": True, "disable_stateful_session_resumption": True}
    return {"name": "tls", "typed_config": config}
