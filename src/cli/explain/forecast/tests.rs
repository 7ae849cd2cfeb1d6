//! The page as a person reads it, and the verdict.

use super::*;

fn explanation(identity: Option<&str>) -> Value {
    let failed = json!({"key": "dag", "wanted": "\"sales_*\"", "had": "\"payroll\"", "trust": "platform"});
    json!({"dag": "payroll", "task": "load", "winner": "payroll", "identity": identity,
        "denied": if identity.is_none() { Some("rule `payroll` denies it") } else { None },
        "remedy": if identity.is_none() { Some("put a rule before it") } else { None },
        "rules": [
            {"rule": "sales", "effect": "airflow-sales", "trust": "platform", "matched": false, "failed": failed, "fail_closed": null},
            {"rule": "payroll", "effect": "airflow-payroll", "trust": "deployment", "matched": true, "failed": null, "fail_closed": null},
            {"rule": "rest", "effect": "deny", "trust": null, "matched": true, "failed": null, "fail_closed": null}]})
}

fn reach(decision: &str, healthy: bool) -> Value {
    json!({"identity": "airflow-payroll", "spiffe_id": "spiffe://t/ns/default/dc/dc1/svc/airflow-payroll", "upstream": "warehouse",
        "leaf": {"serial": "0a", "not_before": "2026-01-01T00:00:00.000Z", "not_after": "2026-01-02T03:04:05.000Z"},
        "decision": decision, "by": "intention airflow-payroll -> warehouse (precedence 9)",
        "remedy": if decision == "denied" { Some("consul intention create -replace -allow airflow-payroll warehouse") } else { None },
        "failures": [{"time": "2026-01-01T00:00:00.000Z", "reason": "connect_failed", "endpoint": "10.0.0.9:20000", "detail": "refused"}],
        "endpoints": [{"target": "warehouse.default.dc1", "address": "10.0.0.9:20000", "healthy": healthy, "ejected": false}]})
}

fn forecast(identity: Option<&str>, reach: Value) -> Forecast {
    Forecast { explanation: explanation(identity), rules: json!("/etc/r.toml"), reach, last_denial: Value::Null }
}

fn text(forecast: &Forecast) -> String {
    let now = moment("2026-01-02T00:04:05.000Z").expect("a moment");
    forecast.text(Some("warehouse"), forecast.verdict(), now)
}

#[test]
fn an_allowed_task_sees_the_rule_the_leaf_the_intention_and_the_endpoints() {
    let shown = text(&forecast(Some("airflow-payroll"), reach("allowed", true)));
    for line in [
        "  no   sales                     airflow-sales             dag wants \"sales_*\", has \"payroll\" (platform)",
        "  =>   payroll                   airflow-payroll           rests on deployment facts",
        "  yes  rest                      deny                      has no condition",
        "The rules of /etc/r.toml in their order; the first that matches decides:",
        "identity     airflow-payroll",
        "leaf         serial 0a, ends 2026-01-02T03:04:05.000Z, 3 h 0 min left",
        "access       allowed: intention airflow-payroll -> warehouse (precedence 9)",
        "endpoints    10.0.0.9:20000  healthy  (warehouse.default.dc1)",
        "failures     2026-01-01T00:00:00.000Z  connect_failed at 10.0.0.9:20000: refused",
        "verdict      a connection to warehouse would be let in, as far as this host knows",
    ] {
        assert!(shown.lines().any(|found| found == line), "{line} is not in\n{shown}");
    }
}

#[test]
fn a_denial_names_what_would_allow_it() {
    let denied = forecast(Some("airflow-payroll"), reach("denied", true));
    assert_eq!(denied.verdict(), Verdict::Denied);
    let shown = text(&denied);
    assert!(shown.contains("would allow  consul intention create -replace -allow airflow-payroll warehouse\n"), "{shown}");
    let nameless = forecast(None, Value::Null);
    assert_eq!(nameless.verdict(), Verdict::Denied);
    let shown = text(&nameless);
    assert!(
        shown.contains("identity     none\nwhy          rule `payroll` denies it\nwould allow  put a rule before it\n"),
        "{shown}"
    );
}

#[test]
fn what_is_not_known_here_is_said_so() {
    let unknown = forecast(Some("airflow-payroll"), reach("unknown", true));
    assert_eq!(unknown.verdict(), Verdict::Unknown);
    assert!(text(&unknown).contains("the called side decides"));
    assert!(text(&forecast(Some("a"), reach("allowed", false))).contains("no endpoint of it is healthy"));
    let mut cold = reach("allowed", true);
    cold["leaf"] = Value::Null;
    assert!(text(&forecast(Some("a"), cold)).contains("fetched with the first connection"));
}

#[test]
fn answers_of_any_shape_panic_nothing() {
    for value in [json!(null), json!([]), json!({"rules": [1, null, {"failed": {}}], "identity": 7}), json!("x")] {
        let forecast = Forecast { explanation: value.clone(), rules: value.clone(), reach: value.clone(), last_denial: value };
        let _ = text(&forecast);
    }
    for moment_text in
        ["", "2026", "2026-13-02T00:00:00.000Z", "9999-12-31T23:59:59.999Z", "1960-01-01T00:00:00Z", "日本日本日本日本"]
    {
        let _ = moment(moment_text);
    }
}
