//! Precedence of flags and environment, and what cannot stand together.

use super::*;
use crate::config::AgentAddress;
use clap::Parser;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    sidecar: Sidecar,
}

fn settings(line: &str, variables: &[(&str, &str)]) -> Result<Settings, UsageError> {
    let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let words = std::iter::once("ringfence").chain(line.split_whitespace());
    Line::try_parse_from(words).map_err(|error| UsageError(error.to_string()))?.sidecar.settings(&environment, &[])
}

fn consul(line: &str, variables: &[(&str, &str)]) -> config::Consul {
    settings(&format!("--sidecar-for=web {line}"), variables).expect(line).sidecar.consul
}

fn refusal(line: &str, variables: &[(&str, &str)]) -> String {
    settings(line, variables).map(|settings| format!("{settings:?}")).expect_err(line).0
}

#[test]
fn tokens_have_consuls_precedence() {
    let all = [("CONSUL_HTTP_TOKEN", "env"), ("CONSUL_HTTP_TOKEN_FILE", "/env/file")];
    let file = |path: &str| format!("File(\"{path}\")");
    let fixed = "Static([redacted])".to_owned();
    for (line, variables, wanted) in [
        ("--token-file=/flag/file --token=flag", &all[..], file("/flag/file")),
        ("--token=flag", &all[..], fixed.clone()),
        ("", &all[..], file("/env/file")),
        ("", &all[..1], fixed.clone()),
        ("--token=", &all[..1], fixed),
        ("", &[], "None".to_owned()),
    ] {
        assert_eq!(format!("{:?}", consul(line, variables).token), wanted, "{line}");
    }
    let TokenSource::Static(token) = consul("--token=flag", &all).token else { panic!("no static token") };
    assert_eq!(token.as_str(), "flag");
}

#[test]
fn the_agents_address_comes_from_flag_then_environment_then_default() {
    let env = [("CONSUL_HTTP_ADDR", "https://env:8501")];
    let host = |line, variables| match consul(line, variables).address {
        AgentAddress::Http { host, port, tls, .. } => format!("{host}:{port} {tls}"),
        AgentAddress::Unix(path) => path.display().to_string(),
    };
    assert_eq!(host("--http-addr=flag:1", &env), "flag:1 false");
    assert_eq!(host("", &env), "env:8501 true");
    assert_eq!(host("", &[]), "127.0.0.1:8500 false");
    assert_eq!(host("", &[("CONSUL_HTTP_SSL", "1")]), "127.0.0.1:8500 true");
    assert_eq!(host("", &[("CONSUL_HTTP_SSL", "")]), "127.0.0.1:8500 false");
    assert_eq!(host("", &[("CONSUL_HTTP_ADDR", "unix:///run/c.sock")]), "/run/c.sock");
    assert!(refusal("--sidecar-for=web", &[("CONSUL_HTTP_SSL", "si")]).contains("CONSUL_HTTP_SSL: `si`"));
    assert!(refusal("--sidecar-for=web --http-addr=x:y", &[]).contains("port is no number"));
}

#[test]
fn every_variable_reaches_its_setting() {
    let consul = consul(
        "--datacenter=dc2",
        &[
            ("CONSUL_CACERT", "/ca.pem"),
            ("CONSUL_CAPATH", "/ca"),
            ("CONSUL_CLIENT_CERT", "/c.pem"),
            ("CONSUL_CLIENT_KEY", "/k.pem"),
            ("CONSUL_TLS_SERVER_NAME", "server.dc1.consul"),
            ("CONSUL_HTTP_SSL_VERIFY", "false"),
            ("CONSUL_HTTP_AUTH", "user"),
            ("CONSUL_NAMESPACE", "team"),
            ("CONSUL_PARTITION", "part"),
        ],
    );
    let wanted = config::AgentTls {
        ca_file: Some("/ca.pem".into()),
        ca_path: Some("/ca".into()),
        client_cert: Some("/c.pem".into()),
        client_key: Some("/k.pem".into()),
        server_name: Some("server.dc1.consul".into()),
        skip_verify: true,
    };
    assert_eq!(consul.tls, wanted);
    assert_eq!(consul.basic_auth.as_ref().map(|auth| auth.as_str()), Some("user:"));
    assert_eq!(
        (consul.namespace.as_deref(), consul.partition.as_deref(), consul.datacenter.as_deref()),
        (Some("team"), Some("part"), Some("dc2"))
    );
}

#[test]
fn a_flag_beats_its_variable() {
    let tls = consul("--ca-file=/flag.pem", &[("CONSUL_CACERT", "/env.pem")]).tls;
    assert_eq!(tls.ca_file, Some("/flag.pem".into()));
    let both = [("CONNECT_SIDECAR_FOR", "env-service"), ("CONNECT_PROXY_ID", "env-proxy")];
    let proxies = |line, variables| settings(line, variables).expect(line).sidecar.consul.proxies;
    assert_eq!(proxies("", &both), [config::Proxy::ProxyId("env-proxy".into())]);
    assert_eq!(proxies("", &both[..1]), [config::Proxy::SidecarFor("env-service".into())]);
    assert_eq!(proxies("--sidecar-for=web", &both), [config::Proxy::SidecarFor("web".into())]);
    assert_eq!(
        proxies("--sidecar-for=a --sidecar-for=b --proxy-id=c", &[]),
        [config::Proxy::SidecarFor("a".into()), config::Proxy::SidecarFor("b".into()), config::Proxy::ProxyId("c".into())]
    );
}

#[test]
fn an_unregistered_service_comes_from_flags() {
    let line = "--service=web --service-addr=8080 --listen=:8443 --upstream=db:9191 --upstream=cache:127.0.0.2:6379";
    let proxies = settings(line, &[]).expect(line).sidecar.consul.proxies;
    let [config::Proxy::Service(service)] = proxies.as_slice() else { panic!("{proxies:?}") };
    assert_eq!(service.listen, Some("0.0.0.0:8443".parse().expect("address")));
    assert_eq!(service.service_address.as_deref(), Some("127.0.0.1:8080"));
    assert_eq!(service.upstreams.len(), 2);
}

#[test]
fn what_cannot_stand_together_is_refused() {
    for (line, wanted) in [
        ("", "which service?"),
        ("--sidecar-for=", "which service?"),
        ("--sidecar-for=web --sidecar-for=web", "-sidecar-for web is named twice"),
        ("--service=web", "-service needs -upstream"),
        ("--service=web --sidecar-for=web", "leave out -sidecar-for"),
        ("--service=web --listen=:8443", "-listen needs -service-addr"),
        ("--service=web --service-addr=80", "-service-addr needs -listen"),
        ("--service=web --upstream=a:1 --upstream=b:1", "two -upstream flags listen on 127.0.0.1:1"),
        ("--sidecar-for=web --upstream=a:1", "need -service NAME"),
        ("--sidecar-for=web --client-cert=/c", "set both or neither"),
        ("--sidecar-for=web --login-method=m", "needs -login-bearer-token-file"),
        ("--sidecar-for=web --login-bearer-token-file=/f", "needs -login-method"),
        ("--sidecar-for=web --login-meta=a=b", "needs -login-method"),
        ("--sidecar-for=web --login-method=m --login-bearer-token-file=/f --token=t", "leave out -token"),
    ] {
        let text = refusal(line, &[]);
        assert!(text.contains(wanted), "{line}: {text}");
    }
}

#[test]
fn the_defaults_are_the_products() {
    let Settings { sidecar, logging, warnings } = settings("--sidecar-for=web", &[]).expect("minimal");
    assert_eq!(sidecar.admin, config::Admin::default());
    assert_eq!(sidecar.connection_log, LogTarget::Stdout);
    assert_eq!(logging, config::Logging::default());
    assert_eq!(sidecar.plane.drain_time, config::DRAIN_TIME);
    assert_eq!(sidecar.plane.keepalive, config::KEEPALIVE);
    assert_eq!(sidecar.plane.hold_time, config::HOLD_TIME);
    assert_eq!(sidecar.consul.mesh_gateway_service, config::Consul::default().mesh_gateway_service);
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn a_token_on_the_command_line_is_warned_of_and_shown_nowhere() {
    let settings = settings("--sidecar-for=web --token=s3cr3t", &[]).expect("valid");
    assert!(settings.warnings.iter().any(|line| line.contains("-token-file")));
    assert!(!format!("{settings:?}").contains("s3cr3t"));
    let line = Line::try_parse_from(["ringfence", "--sidecar-for=web", "--token=s3cr3t"]).expect("valid");
    assert!(!format!("{line:?}").contains("s3cr3t"));
    let environment: Environment = [("CONSUL_HTTP_TOKEN".to_owned(), "s3cr3t".to_owned())].into_iter().collect();
    assert!(!format!("{environment:?}").contains("s3cr3t"));
}

#[test]
fn an_open_admin_port_is_warned_of() {
    let settings = settings("--sidecar-for=web --admin-bind=0.0.0.0:19000", &[]).expect("valid");
    assert!(settings.warnings.iter().any(|line| line.contains("no access control")));
}
