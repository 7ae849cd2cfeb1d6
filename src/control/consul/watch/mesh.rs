//! The `mesh` config entry: TLS versions and cipher suites. Absent, unreadable and unknown (Consul 1.8) all mean Consul's defaults.

use super::{Context, Follower, Spec, Turn, Update};
use crate::control::backoff::jittered;
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;
use crate::tls::{Suites, TlsParams};

const SPEC: Spec = Spec { class: Class::Background, style: Style::Index, cached: false };
/// Where there is no entry, one may be written some day.
const ABSENT_INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);

pub(super) async fn watch(cx: &Context) {
    let request = Request::get(Endpoint::Mesh, &["config", "mesh", "mesh"]);
    let mut follower = Follower::new(cx, SPEC, &request);
    let mut known = false;
    loop {
        match follower.turn().await {
            Turn::Answer { response, changed } => {
                if changed {
                    match decode(&response) {
                        Ok(update) => {
                            follower.accept(&response);
                            known = true;
                            cx.data(update).await;
                        }
                        Err(error) => {
                            follower.went_wrong(&error).await;
                            continue;
                        }
                    }
                }
                follower.went_well(&response).await;
            }
            // 404: no entry. 403: may not read it. 400 and 500 `invalid config entry kind`: Consul before 1.10.
            Turn::Failed(AgentError::NotFound { .. }) => {
                cx.data(Update::Mesh(TlsParams::DEFAULT)).await;
                follower.cursor.restart();
                tokio::time::sleep(jittered(ABSENT_INTERVAL)).await;
            }
            Turn::Failed(
                AgentError::Forbidden { .. }
                | AgentError::TokenUnknown { .. }
                | AgentError::Rejected { .. }
                | AgentError::Server { .. },
            ) => {
                if !known {
                    cx.data(Update::Mesh(TlsParams::DEFAULT)).await;
                }
                follower.cursor.restart();
                tokio::time::sleep(jittered(ABSENT_INTERVAL)).await;
            }
            Turn::Failed(error) => follower.went_wrong(&error).await,
            Turn::Interrupted => {}
        }
    }
}

fn decode(response: &Response) -> Result<Update, AgentError> {
    // Every field has a default, so any object is believed; what is no object is no config entry.
    if response.body.trim_ascii_start().first() != Some(&b'{') {
        return Err(AgentError::Malformed { endpoint: Endpoint::Mesh, detail: "it is no object".to_owned() });
    }
    let mesh: wire::Mesh = response.json(Endpoint::Mesh)?;
    params(&mesh.tls).map(Update::Mesh).map_err(|detail| AgentError::Malformed { endpoint: Endpoint::Mesh, detail })
}

/// One range for both directions: the stricter of the two, because one configuration serves both roles.
fn params(tls: &wire::MeshTls) -> Result<TlsParams, String> {
    let ranges = [range(&tls.incoming)?, range(&tls.outgoing)?];
    let suites = [&tls.incoming, &tls.outgoing].map(|tls| Suites::named(tls.suites.iter().map(String::as_str)));
    let suites = suites.into_iter().fold(Suites::ALL, Suites::and);
    let tls12 = !suites.is_empty();
    if !tls12 {
        let remedy = "add one to CipherSuites of the mesh config entry: Envoy dials with TLS 1.2";
        tracing::warn!(spoken = %Suites::known(), remedy, "the mesh allows no cipher suite that is spoken here, so TLS 1.2 is off");
    }
    let all = TlsParams {
        tls12: tls12 && ranges.iter().all(|(low, high)| (*low..=*high).contains(&2)),
        tls13: ranges.iter().all(|(low, high)| (*low..=*high).contains(&3)),
        suites,
    };
    if all.tls12 || all.tls13 {
        Ok(all)
    } else if suites.is_empty() {
        Err(format!("its CipherSuites leave none of {} in both directions, and TLS 1.3 is not allowed; add one", Suites::known()))
    } else {
        Err("its TLS versions leave neither TLS 1.2 nor 1.3 in both directions; allow one of them".to_owned())
    }
}

fn range(tls: &wire::TlsRange) -> Result<(u8, u8), String> {
    Ok((version(&tls.min)?.unwrap_or(0), version(&tls.max)?.unwrap_or(3)))
}

fn version(text: &str) -> Result<Option<u8>, String> {
    match text {
        "" | "TLS_AUTO" => Ok(None),
        "TLSv1_0" => Ok(Some(0)),
        "TLSv1_1" => Ok(Some(1)),
        "TLSv1_2" => Ok(Some(2)),
        "TLSv1_3" => Ok(Some(3)),
        other => Err(format!("TLS version `{}` is unknown", other.escape_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stricter_direction_counts() {
        let of = |text: &str| {
            let mesh: wire::Mesh = serde_json::from_str(text).expect("JSON");
            params(&mesh.tls)
        };
        assert_eq!(of(r#"{"Kind":"mesh"}"#), Ok(TlsParams::DEFAULT));
        assert_eq!(
            of(r#"{"TLS":{"Incoming":{"TLSMinVersion":"TLSv1_3"},"Outgoing":null}}"#),
            Ok(TlsParams { tls12: false, tls13: true, ..TlsParams::DEFAULT })
        );
        assert_eq!(
            of(r#"{"TLS":{"Outgoing":{"TLSMinVersion":"TLS_AUTO","TLSMaxVersion":"TLSv1_2"}}}"#),
            Ok(TlsParams { tls12: true, tls13: false, ..TlsParams::DEFAULT })
        );
        let suites = Suites::named(["TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"]);
        let narrow =
            r#"{"TLS":{"Incoming":{"CipherSuites":["TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384","TLS_RSA_WITH_AES_128_CBC_SHA"]}}}"#;
        assert_eq!(of(narrow), Ok(TlsParams { suites, ..TlsParams::DEFAULT }));
        let other =
            |max: &str| of(&format!(r#"{{"TLS":{{"Outgoing":{{"CipherSuites":["AES128-SHA"],"TLSMaxVersion":"{max}"}}}}}}"#));
        assert_eq!(other("TLSv1_3").map(|params| (params.tls12, params.tls13)), Ok((false, true)));
        assert!(other("TLSv1_2").expect_err("nothing left").contains("ECDHE-RSA-AES128-GCM-SHA256"));
        assert!(of(r#"{"TLS":{"Incoming":{"TLSMaxVersion":"TLSv1_1"}}}"#).is_err());
        assert!(of(r#"{"TLS":{"Incoming":{"TLSMaxVersion":"SSLv3"}}}"#).is_err());
        assert!(decode(&Response::with_body(b"[]")).is_err() && decode(&Response::with_body(b"")).is_err());
        assert_eq!(
            serde_json::from_value::<wire::Mesh>(crate::control::fixture("config-mesh")).map(|mesh| params(&mesh.tls)).ok(),
            Some(Ok(TlsParams::DEFAULT))
        );
    }
}
