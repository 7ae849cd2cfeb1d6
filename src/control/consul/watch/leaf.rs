//! A service's certificate and key. One blocking query is open whenever there is room: the agent renews only then, and a
//! read that does not block may bring an expired certificate (Consul 1.8).

use super::{Context, Name, Spec, Update, follow_always};
use crate::control::consul::budget::Class;
use crate::control::consul::client::Request;
use crate::control::consul::cursor::Style;
use crate::control::consul::error::Endpoint;

const SPEC: Spec = Spec { class: Class::Leaf, style: Style::Index, cached: false };

pub(super) async fn watch(cx: &Context, name: &Name) {
    let request = name.scope(Request::get(Endpoint::Leaf, &["agent", "connect", "ca", "leaf", &name.service]));
    follow_always(cx, SPEC, &request, |response| response.json(Endpoint::Leaf).map(Update::Leaf)).await;
}
