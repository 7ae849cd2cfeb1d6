//! The page for people: `/airflow`, its script and its style, all from this tree.
//!
//! Invariant: the page holds no data. Its script asks the port's own JSON and puts every value in as text, so a hostile DAG
//! name is a word on the page and nothing else; the policy header forbids whatever else might run or load, so it works without
//! a network too.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use super::routes;

const HTML: &str = include_str!("page/airflow.html");
const SCRIPT: &str = include_str!("page/airflow.js");
const STYLE: &str = include_str!("page/airflow.css");
/// Nothing from elsewhere, nothing inline, no frame around it.
const POLICY: &str = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
const REFERRER: HeaderName = HeaderName::from_static("referrer-policy");

pub(super) async fn page() -> Response {
    file("text/html; charset=utf-8", HTML)
}

/// What the page loads.
pub(super) fn parts<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/airflow/page.js", any(|| async { file("text/javascript; charset=utf-8", SCRIPT) }))
        .route("/airflow/page.css", any(|| async { file("text/css; charset=utf-8", STYLE) }))
}

fn file(content_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        // The address holds names of DAGs and tasks.
        (REFERRER, HeaderValue::from_static("no-referrer")),
    ];
    (headers, routes::answer(StatusCode::OK, content_type, text)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_puts_no_value_in_as_markup() {
        for text in [HTML, SCRIPT, STYLE] {
            for outside in ["http:", "https:", "@import", "url("] {
                let found = text.replace("http://www.w3.org/2000/svg", "").contains(outside);
                assert!(!found, "the page names {outside}");
            }
        }
        let markup =
            ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "setHTML", "srcdoc"];
        for way in markup {
            assert!(!SCRIPT.contains(way), "{way} would let a value become markup");
        }
        for inline in [" style=", "<style", "onload", "onclick", "onerror", "javascript:"] {
            assert!(!HTML.contains(inline), "{inline} would need a weaker policy");
        }
        assert_eq!((HTML.matches("<script").count(), HTML.matches("</script>").count()), (1, 1));
    }
}
