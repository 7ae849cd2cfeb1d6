//! The mesh's roots, followed once for the whole process.

use super::{Context, Spec, Update, follow_always};
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

const SPEC: Spec = Spec { class: Class::Policy, style: Style::Index, cached: false };

pub(super) async fn watch(cx: &Context) {
    let request = Request::get(Endpoint::Roots, &["agent", "connect", "ca", "roots"]);
    follow_always(cx, SPEC, &request, decode).await;
}

fn decode(response: &Response) -> Result<Update, AgentError> {
    let roots: wire::Roots = response.json(Endpoint::Roots)?;
    let malformed = |detail: &str| AgentError::Malformed { endpoint: Endpoint::Roots, detail: detail.to_owned() };
    if roots.roots.is_empty() {
        return Err(malformed("no roots in it"));
    }
    if roots.trust_domain.is_empty() {
        return Err(malformed("no trust domain in it"));
    }
    Ok(Update::Roots(roots))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_without_roots_are_refused() {
        let of = |body: &str| decode(&Response::with_body(body.as_bytes()));
        assert!(of(r#"{"ActiveRootID":"","TrustDomain":"t.consul","Roots":[]}"#).is_err());
        assert!(of("null").is_err() && of("[").is_err() && of("").is_err());
        let capture = crate::control::fixture("ca-roots").to_string();
        match of(&capture).expect("the capture parses") {
            Update::Roots(roots) => {
                assert_eq!(roots.trust_domain, "97d2480b-024d-49f9-e76e-de4d1e3eb356.consul");
                assert_eq!(roots.roots.len(), 1);
            }
            other => panic!("{other:?}"),
        }
    }
}
