//! The page for people in a real Chromium: it shows who talks to whom, and whatever a task is called stays text.

mod support;

#[path = "support/callers.rs"]
mod callers;

use std::process::Command;
use std::time::Duration;

use callers::{Port, snapshot, stranger, task};

/// Would change the page's title, were it ever taken for markup.
const HOSTILE: &str = r#"<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"#;
/// The same as text in a document.
const HOSTILE_AS_TEXT: &str = "&lt;img src=x onerror=";
/// Time that Chromium lets pass for the page, in its own clock: several turns of the page's polling.
const PAGE_TIME_MS: u32 = 7_000;
/// A browser that takes longer hangs.
const CHROMIUM_TIMEOUT: Duration = Duration::from_secs(25);

/// What Chromium makes of the page, after its script has run.
fn page(port: &Port, query: &str) -> String {
    let profile = support::scratch();
    let mut chromium = Command::new(support::tool_on_path("chromium"));
    chromium.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-extensions",
    ]);
    chromium.args(["--disable-background-networking", "--disable-component-update", "--no-proxy-server"]);
    chromium.arg(format!("--user-data-dir={}", profile.path().display()));
    chromium.arg(format!("--virtual-time-budget={PAGE_TIME_MS}"));
    chromium.args(["--dump-dom", &format!("http://{}/airflow{query}", port.address)]);
    support::process::run(&mut chromium, CHROMIUM_TIMEOUT)
}

#[test]
fn a_hostile_name_is_a_word_on_the_page_and_nothing_else() {
    let mut port = Port::start();
    port.publish(snapshot(&["airflow-payroll"]));
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    port.closed(task(HOSTILE, HOSTILE, "airflow-etl"), "warehouse");
    let id = port.denied(task(HOSTILE, "load", "airflow-etl"), "warehouse", 7);
    port.denied(stranger(HOSTILE), HOSTILE, 8);

    let shown = page(&port, "");
    assert!(shown.contains("<title>ringfence: who talks to whom</title>"), "the title was changed: {shown}");
    assert!(!shown.contains("<img") && shown.matches("<script").count() == 1, "a name became markup: {shown}");
    assert!(shown.matches(HOSTILE_AS_TEXT).count() >= 5, "the names are not all there: {shown}");
    for wanted in [
        "payroll_daily / load",
        "airflow-payroll",
        "no identity",
        &*id,
        "consul intention create -replace -allow airflow-etl warehouse",
        "spiffe://t.consul/ns/default/dc/dc1/svc/airflow-payroll",
        "<meter",
        "2 days",
        "Counted since",
    ] {
        assert!(shown.contains(wanted), "{wanted} is not on the page: {shown}");
    }
}

#[test]
fn the_address_presets_the_filter_and_a_hostile_one_is_text_too() {
    let mut port = Port::start();
    port.publish(snapshot(&[]));
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    port.closed(task("payroll_daily", "copy", "airflow-payroll"), "warehouse");
    port.closed(task("sales", "load", "airflow-sales"), "warehouse");
    port.denied(stranger("psql"), "warehouse", 9);

    let shown = page(&port, "?dag=payroll_*&task=load&run=");
    assert!(shown.contains("payroll_daily / load"), "{shown}");
    for hidden in ["payroll_daily / copy", "airflow-sales", "psql"] {
        assert!(!shown.contains(hidden), "{hidden} passed the filter: {shown}");
    }

    let shown = page(&port, "?dag=%3Cimg%20src=x%20onerror=%22document.title='owned'%22%3E");
    assert!(shown.contains("<title>ringfence: who talks to whom</title>") && !shown.contains("<img"), "{shown}");
    assert!(!shown.contains("payroll_daily / load") && shown.contains("Nothing to show."), "{shown}");
}
