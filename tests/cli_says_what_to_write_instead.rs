//! A wrong command line ends with exit code 64 and one sentence that names the flag and what to write instead; nothing
//! starts. Help prints and ends with 0. Runs the built program.

use std::process::{Command, Output};

/// Runs the program with only the variables given, so that the host's own Consul settings change nothing.
fn ringfence(line: &str, variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringfence"))
        .args(line.split_whitespace())
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .expect("the program runs")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[test]
fn usage_mistakes_end_with_64_and_one_line() {
    for (line, wanted) in [
        ("connect", "which service?"),
        ("connect web", "did you mean -sidecar-for web?"),
        ("connect -sidecar-fro web", "did you mean -sidecar-for?"),
        ("connect -sidecar-for", "flag -sidecar-for needs a value"),
        ("connect -sidecar-for web -sidecar-for web", "named twice"),
        ("connect -sidecar-for web -drain-time later", "no duration"),
        ("connect -sidecar-for web -workers none", "no number of workers"),
        ("connect -sidecar-for web -log-level loud", "no log level"),
        ("connect -sidecar-for web -http-addr host:port", "the port is no number"),
        ("connect -sidecar-for web -client-cert /c.pem", "go together"),
        ("connect -gateway=mesh -register", "cannot be a gateway"),
        ("connect -mesh-gateway", "cannot be a gateway"),
        ("connect -sidecar-for web -expose-servers", "cannot be a gateway"),
        ("connect -sidecar-for web -bootstrap", "/snapshot"),
        ("connect -service web -register -listen :8443 -service-addr 80", "consul services register"),
        ("conect", "did you mean connect?"),
        ("agent -bind 0.0.0.0:8500", "no loopback address"),
        ("agent -default-policy maybe", "no policy"),
        ("demo -onec", "did you mean -once?"),
        ("demo -envoy-binary x", "unknown flag -envoy-binary"),
    ] {
        let output = ringfence(line, &[]);
        let text = err(&output);
        assert_eq!(output.status.code(), Some(64), "{line}: {text}");
        assert!(text.starts_with("ringfence: ") && text.contains(wanted), "{line}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{line}: {text}");
        assert_eq!(out(&output), "", "{line}");
    }
}

#[test]
fn a_wrong_variable_is_named() {
    let output = ringfence("connect -sidecar-for web", &[("CONSUL_HTTP_SSL", "perhaps")]);
    assert_eq!(output.status.code(), Some(64));
    assert!(err(&output).contains("CONSUL_HTTP_SSL: `perhaps` is neither true nor false"), "{}", err(&output));
    let output = ringfence("connect -sidecar-for web", &[("CONSUL_HTTP_ADDR", "ftp://agent")]);
    assert_eq!(output.status.code(), Some(64));
    assert!(err(&output).contains("CONSUL_HTTP_ADDR"), "{}", err(&output));
}

#[test]
fn help_ends_with_0_and_shows_examples_and_exit_codes() {
    for line in ["--help", "-h", "", "connect --help", "connect -h", "connect -help", "check -h", "agent -h", "demo -h"] {
        let output = ringfence(line, &[]);
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(out(&output).contains("Examples:"), "{line}: {}", out(&output));
        assert_eq!(err(&output), "", "{line}");
    }
    for code in ["64", "69", "70", "78"] {
        assert!(out(&ringfence("--help", &[])).contains(code));
    }
    let version = ringfence("--version", &[]);
    // In Envoy's form, because `consul connect envoy -envoy-binary` asks so.
    let text = out(&version);
    assert_eq!(version.status.code(), Some(0));
    assert!(text.ends_with(&format!("/1.40.0/Clean/RELEASE/ringfence-{}\n\n", env!("CARGO_PKG_VERSION"))), "{text}");
}

#[test]
fn help_names_every_flag_and_variable_of_the_promise() {
    let help = out(&ringfence("connect -h", &[]));
    for flag in [
        "sidecar-for",
        "proxy-id",
        "http-addr",
        "token",
        "token-file",
        "ca-file",
        "ca-path",
        "client-cert",
        "client-key",
        "tls-server-name",
        "namespace",
        "partition",
        "datacenter",
        "admin-bind",
        "admin-access-log-path",
        "workers",
        "drain-time",
        "keepalive",
        "hold-time",
        "service",
        "service-addr",
        "upstream",
        "listen",
        "login-method",
        "login-bearer-token-file",
        "login-meta",
        "log-level",
        "log-json",
        "connection-log",
        "mesh-gateway-service",
    ] {
        assert!(help.contains(&format!("--{flag} ")) || help.contains(&format!("--{flag}[")), "no -{flag} in:\n{help}");
    }
    for variable in [
        "CONSUL_HTTP_ADDR",
        "CONSUL_HTTP_TOKEN",
        "CONSUL_HTTP_TOKEN_FILE",
        "CONSUL_CACERT",
        "CONSUL_CAPATH",
        "CONSUL_CLIENT_CERT",
        "CONSUL_CLIENT_KEY",
        "CONSUL_TLS_SERVER_NAME",
        "CONSUL_NAMESPACE",
        "CONSUL_PARTITION",
        "CONNECT_SIDECAR_FOR",
        "CONNECT_PROXY_ID",
    ] {
        assert!(help.contains(variable), "no {variable} in:\n{help}");
    }
}

#[test]
fn no_token_is_repeated_in_a_message() {
    for line in ["connect -token s3cr3t", "connect -token=s3cr3t -token-flie x", "check -token s3cr3t -workers x"] {
        let output = ringfence(line, &[("CONSUL_HTTP_TOKEN", "s3cr3t")]);
        assert_eq!(output.status.code(), Some(64), "{line}");
        assert!(!err(&output).contains("s3cr3t") && !out(&output).contains("s3cr3t"), "{line}: {}", err(&output));
    }
}
