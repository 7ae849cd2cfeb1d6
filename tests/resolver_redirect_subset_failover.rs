//! Service resolvers hold: redirect, subset, default subset and failover, at a real Consul.

mod support;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;

use serde_json::json;
use support::pair::resolver;
use support::{Banner, Consul, Custom, Definition, Mesh, PATIENCE, Sidecar, ports, traffic, wait_for};

/// A mesh with db (v1 and v2) and backup, all in one process, and web with these upstreams.
struct Cast {
    consul: Consul,
    _apps: Vec<Custom>,
    _servers: Sidecar,
    web: Sidecar,
    database: SocketAddr,
    db: SocketAddr,
}

#[test]
fn redirect_subset_and_failover() {
    let cast = Cast::start();
    let consul = &cast.consul;

    // The default subset decides for plain `db`.
    expect(&cast, cast.db, "v1");

    // `database` is no service at all: it redirects to a subset of db, whose identity then answers.
    expect(&cast, cast.database, "v2");
    // Before both were healthy the failover may have answered.
    cast.web.wait_connection("answered by the redirect's target", |line| {
        line["upstream"] == "database" && line["destination"].as_str().is_some_and(|id| id.ends_with("/svc/db"))
    });

    // Both subsets change places while traffic could go on.
    consul.configure(&resolver(
        "db",
        &json!({"DefaultSubset": "v2", "Subsets": subsets(), "Failover": {"*": {"Service": "backup"}}}),
    ));
    expect(&cast, cast.db, "v2");

    // db goes into maintenance: the failover's identity is another service's.
    for id in ["db-1-sidecar-proxy", "db-2-sidecar-proxy"] {
        let path = format!("/v1/agent/service/maintenance/{id}?enable=true");
        consul.client().put(&path, &serde_json::Value::Null).ok("maintenance");
    }
    expect(&cast, cast.db, "backup");
    cast.web.wait_connection("through the failover", |line| {
        line["destination"].as_str().is_some_and(|id| id.ends_with("/svc/backup"))
    });

    // And back.
    let path = "/v1/agent/service/maintenance/db-2-sidecar-proxy?enable=false";
    consul.client().put(path, &serde_json::Value::Null).ok("end of maintenance");
    expect(&cast, cast.db, "v2");
}

fn subsets() -> serde_json::Value {
    json!({"v1": {"Filter": "Service.Meta.version == v1"}, "v2": {"Filter": "Service.Meta.version == v2"}})
}

/// Waits until `upstream` is answered by the app called `name`.
fn expect(cast: &Cast, upstream: SocketAddr, name: &str) {
    wait_for(&format!("{name} answers"), PATIENCE, || {
        let stream = traffic::connect(upstream).map_err(|error| error.to_string())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).map_err(|error| error.to_string())?;
        if line.trim() == name { Ok(()) } else { Err(format!("{line:?} answered\n{}", cast.web.process.tail())) }
    });
}

impl Cast {
    fn start() -> Self {
        let consul = Consul::start();
        let apps = ["v1", "v2", "backup"].map(Banner::start);
        consul.register(&Definition::new("db").id("db-1").meta("version", "v1").app(apps[0].address));
        consul.register(&Definition::new("db").id("db-2").meta("version", "v2").app(apps[1].address));
        consul.register(&Definition::new("backup").app(apps[2].address));
        let (database, db) = (ports::free_address(), ports::free_address());
        consul.register(&Definition::new("web").upstream("database", database).upstream("db", db));
        consul.configure(&resolver(
            "db",
            &json!({"DefaultSubset": "v1", "Subsets": subsets(), "Failover": {"*": {"Service": "backup"}}}),
        ));
        consul.configure(&resolver("database", &json!({"Redirect": {"Service": "db", "ServiceSubset": "v2"}})));
        consul.allow("web", "db");
        consul.allow("web", "backup");
        let identities = json!({"ServiceIdentities": [{"ServiceName": "db"}, {"ServiceName": "backup"}]});
        let (_, token) = consul.make_token(&identities);
        let servers = Sidecar::of("db-1").and("db-2").and("backup").token(Some(&token)).start(&consul);
        let web = Sidecar::start(&consul, "web");
        Self { consul, _apps: apps.into(), _servers: servers, web, database, db }
    }
}
