//! `/listeners`: names and addresses, of the mesh's listeners and of those for admin pages.
//!
//! Names are Consul's: `public_listener:ADDRESS`, `UPSTREAM:ADDRESS`; a router has the name that Consul gave it.

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::routes::{self, Admin, Parameters, TEXT};
use super::{Shared, proto_json};
use crate::mesh::{Bind, Service, Snapshot};

pub(super) async fn listeners(State(shared): Admin, Query(parameters): Query<Parameters>) -> Response {
    let all = all(&shared);
    if routes::parameter(&parameters, "format") != Some("json") {
        let text = all.iter().fold(String::new(), |text, (name, bind)| text + &format!("{name}::{bind}\n"));
        return routes::answer(StatusCode::OK, TEXT, text);
    }
    let statuses: Vec<Value> =
        all.iter().map(|(name, bind)| json!({"name": name, "local_address": proto_json::bind(bind)})).collect();
    if statuses.is_empty() {
        return proto_json::answer(&json!({}));
    }
    proto_json::answer(&json!({ "listener_statuses": statuses }))
}

fn all(shared: &Shared) -> Vec<(String, Bind)> {
    let pages = shared.pages().into_iter().map(|page| (page.name, Bind::Tcp(page.bind)));
    pages.chain(of_mesh(&shared.viewer.current()).map(|(name, bind)| (name, bind.clone()))).collect()
}

fn of_mesh(snapshot: &Snapshot) -> impl Iterator<Item = (String, &Bind)> {
    let of_services = snapshot.services.iter().flat_map(|service| {
        let public = public(service).into_iter();
        public.chain(service.upstreams.iter().map(|upstream| (format!("{}:{}", upstream.name, upstream.bind), &upstream.bind)))
    });
    let settings = snapshot.routers.iter().map(|router| router.settings());
    of_services.chain(settings.map(|settings| (settings.name.to_string(), &settings.bind)))
}

fn public(service: &Service) -> Option<(String, &Bind)> {
    service.public.as_ref().map(|public| (format!("public_listener:{}", public.bind), &public.bind))
}
