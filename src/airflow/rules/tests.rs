//! Promises of whole rules files.

mod hostile;

use super::*;
use crate::airflow::catalog::Catalog;

const PATH: &str = "airflow.toml";
const TOP: &str = "catalog = '/c.json'\nqueues = ['default']\n";
const CATALOG: &str = r#"{"version": 1, "dags": {
    "payroll_daily": {"path": "finance/payroll.py", "bundle": "finance", "team": "fin", "tags": ["mesh:etl"], "owners": ["ann"],
        "roles": {"can_edit": ["finance"], "can_read": ["finance", "audit"]}, "tasks": {"load": {"pool": "p", "operator": "Sql"}}},
    "hr_sync": {"path": "hr/sync.py", "bundle": "hr", "team": null, "tags": [], "owners": [], "roles": {}, "tasks": {}},
    "bare": {}}}"#;

fn file(rules: &str) -> File {
    Rules::parse(&format!("{TOP}{rules}"), Path::new(PATH)).unwrap()
}

fn error(rules: &str) -> String {
    Rules::parse(&format!("{TOP}{rules}"), Path::new(PATH)).unwrap_err().to_string()
}

fn catalog() -> Catalog {
    Catalog::parse(CATALOG.as_bytes(), Path::new("c.json")).unwrap()
}

/// One question to one rules file.
struct Asked<'a> {
    dag: &'a str,
    task: &'a str,
    run: &'a str,
    uid: u32,
    queues: &'a [&'a str],
}

impl Default for Asked<'_> {
    fn default() -> Self {
        Self { dag: "payroll_daily", task: "load", run: "scheduled__2026-11-24", uid: 0, queues: &["default"] }
    }
}

impl Asked<'_> {
    fn with<T>(&self, then: impl FnOnce(&Facts<'_>) -> T) -> T {
        let catalog = catalog();
        let queues: Vec<Arc<str>> = self.queues.iter().map(|queue| Arc::from(*queue)).collect();
        then(&Facts {
            dag: self.dag,
            task: self.task,
            run: Some(self.run),
            uid: Some(self.uid),
            queues: &queues,
            catalog: catalog.get(self.dag),
        })
    }

    fn of(&self, rules: &Rules) -> Result<String, Refusal> {
        self.with(|facts| rules.decide(facts, &mut Names::default())).map(|grant| grant.identity().to_string())
    }
}

fn dag(name: &str) -> Asked<'_> {
    Asked { dag: name, ..Asked::default() }
}

/// Whether a rule with these conditions gives its identity.
fn holds(conditions: &str, asked: &Asked<'_>) -> bool {
    let rules = file(&format!("[[rule]]\nidentity = 'x'\nallow_author_claims = true\n{conditions}")).rules;
    asked.of(&rules).is_ok()
}

/// Whether a rule with these conditions denies, where everything else is allowed.
fn denies(conditions: &str, asked: &Asked<'_>) -> bool {
    let rules = file(&format!("default = 'x'\n[[rule]]\ndeny = true\n{conditions}")).rules;
    asked.of(&rules).is_err()
}

#[test]
fn the_first_rule_that_matches_wins() {
    let rules = file(
        "[[rule]]\nname = 'load'\nidentity = 'first'\ndag = ['payroll_*']\ntask = ['load_*', 'load']\n\
         [[rule]]\nidentity = 'second'\ndag = 'payroll_*'\n\
         [[rule]]\nname = 'never'\ndeny = true\ndag = ['hr_*']\n\
         [[rule]]\nname = 'catch-all'\nidentity = 'rest'\n",
    )
    .rules;
    assert_eq!(Asked::default().of(&rules).unwrap(), "first");
    assert_eq!(Asked { task: "end", ..Asked::default() }.of(&rules).unwrap(), "second");
    assert_eq!(dag("other").of(&rules).unwrap(), "rest");
    let refusal = dag("hr_sync").of(&rules).unwrap_err();
    assert_eq!((&*refusal.rule, &*refusal.why), ("never", "rule `never` denies it"));
    let grant = Asked { task: "end", ..Asked::default() }.with(|facts| rules.decide(facts, &mut Names::default())).unwrap();
    assert_eq!(&**grant.rule(), "rule-2");
}

#[test]
fn every_condition_matches_what_it_names_and_nothing_else() {
    let asked = Asked::default();
    for yes in [
        "dag = ['payroll_*']",
        "task = ['l?ad']",
        "path = ['finance/**']",
        "bundle = ['hr', 'finance']",
        "team = 'fin'",
        "queue = ['default', 'x']",
        "run_type = ['manual', 'scheduled']",
        "run_as_user = ['root']",
        "run_as_user = [0]",
        "role = 'finance'",
        "role = ['x', 'audit']\npermission = 'can_read'",
        "tag = ['mesh:etl']",
        "owner = ['ann']",
        "pool = ['p']",
        "operator = ['Sql']",
    ] {
        assert!(holds(yes, &asked), "{yes}");
        assert!(denies(yes, &asked), "{yes}");
    }
    for no in [
        "dag = ['payroll']",
        "task = ['LOAD']",
        "path = ['hr/**']",
        "bundle = ['fin']",
        "team = 'finance'",
        "queue = ['x']",
        "run_type = ['manual']",
        "run_as_user = ['1']",
        "role = 'audit'",
        "role = 'finance'\npermission = 'can_delete'",
        "tag = ['mesh']",
        "owner = ['bob']",
        "pool = ['q']",
        "operator = ['Python']",
        "dag = ['payroll_*']\ntask = ['end']",
    ] {
        assert!(!holds(no, &asked), "{no}");
        assert!(!denies(no, &asked), "{no}");
    }
}

#[test]
fn a_rule_that_gives_needs_every_fact_and_a_rule_that_denies_takes_its_absence() {
    let needs = [
        "path = ['f/**']",
        "bundle = 'b'",
        "team = 't'",
        "role = 'r'",
        "tag = 't'",
        "owner = 'o'",
        "pool = 'p'",
        "operator = 'O'",
    ];
    for unknown in ["not_in_catalog", "bare"] {
        for condition in needs {
            assert!(!holds(condition, &dag(unknown)), "{unknown}: {condition}");
            assert!(denies(condition, &dag(unknown)), "{unknown}: {condition}");
        }
    }
    // Known not to hold: known to be empty, or kept from matching by another condition.
    for condition in ["team = 't'", "role = 'r'", "tag = 't'", "owner = 'o'"] {
        assert!(!denies(condition, &dag("hr_sync")), "{condition}");
    }
    assert!(!denies("dag = ['payroll_*']\npath = ['finance/**']", &dag("not_in_catalog")));
    assert!(denies("dag = ['not_*']\npath = ['finance/**']", &dag("not_in_catalog")));
}

#[test]
fn a_denial_for_want_of_a_fact_says_so() {
    let rules = file("default = 'x'\n[[rule]]\nname = 'no-hr'\ndeny = true\npath = ['hr/**']\n").rules;
    let refusal = dag("new_dag").of(&rules).unwrap_err();
    assert_eq!(&*refusal.why, "rule `no-hr` denies by `path`, for want of the fact: the catalog does not have this DAG");
    assert_eq!(&*refusal.remedy, "write the catalog anew: airflow mesh catalog --out FILE");
}

#[test]
fn a_queue_is_known_only_where_every_queue_of_the_host_agrees() {
    let asked = |queues| Asked { queues, ..Asked::default() };
    let condition = "queue = ['finance', 'hr']";
    assert!(holds(condition, &asked(&["finance"])) && holds(condition, &asked(&["hr", "finance"])));
    assert!(!holds(condition, &asked(&["finance", "default"])) && !holds(condition, &asked(&["default"])));
    assert!(denies(condition, &asked(&["finance", "default"])));
    assert!(!denies(condition, &asked(&["default"])));
}

#[test]
fn a_run_id_that_tells_no_type_cannot_slip_past_a_denial() {
    let asked = |run| Asked { run, ..Asked::default() };
    for (run, kind) in [
        ("manual__2026", "manual"),
        ("backfill__1", "backfill"),
        ("asset_triggered__x", "asset_triggered"),
        ("dataset_triggered__x", "dataset_triggered"),
        ("mine", "other"),
        ("manual_x", "other"),
        ("", "other"),
    ] {
        assert!(holds(&format!("run_type = '{kind}'"), &asked(run)), "{run}");
    }
    assert!(!holds("run_type = 'manual'", &asked("mine")));
    assert!(denies("run_type = 'manual'", &asked("mine")));
    assert!(!denies("run_type = 'manual'", &asked("scheduled__x")));
    assert!(!denies("run_type = 'other'", &asked("scheduled__x")));
    assert!(error("[[rule]]\nidentity = 'x'\nrun_type = 'schedule'").contains("did you mean \"scheduled\"?"));
}

#[test]
fn without_a_match_the_default_decides() {
    let rule = "[[rule]]\nidentity = 'x'\ndag = ['a']\n";
    let grant =
        dag("b").with(|facts| file(&format!("default = 'airflow-other'\n{rule}")).rules.decide(facts, &mut Names::default()));
    assert_eq!(grant, Ok(Grant::by_rule("airflow-other".into(), "default".into())));
    let refusal = dag("b").of(&file(rule).rules).unwrap_err();
    assert_eq!(&*refusal.rule, "default");
    assert_eq!(&*refusal.why, "no rule matches DAG \"b\", task \"load\", and `default` is \"deny\"");
    assert_eq!(&*refusal.remedy, "add a [[rule]] with dag = [\"b\"] and an identity to airflow.toml");
    let refusal = dag("b").of(&file("[[rule]]\nname = 'p'\nidentity = 'x'\nbundle = ['a']\n").rules).unwrap_err();
    assert!(refusal.why.contains("rule `p` could not: its `bundle` needs a fact, and the catalog does not have this DAG"));
    assert!(dag("b\u{1b}[2J").of(&file(rule).rules).unwrap_err().why.contains("\"b\\u{1b}[2J\""));
}

#[test]
fn author_claims_alone_need_to_be_allowed() {
    for claims in ["tag = 'a'", "owner = 'a'\npool = 'p'", "operator = 'O'"] {
        let rule = format!("[[rule]]\nidentity = 'x'\n{claims}\n");
        assert!(error(&rule).contains("add a condition of another kind, or allow_author_claims = true"), "{claims}");
        assert!(error(&format!("{rule}allow_author_claims = false")).contains("allow_author_claims"), "{claims}");
        assert!(file(&format!("{rule}allow_author_claims = true")).warnings[0].contains("whoever can edit a DAG"), "{claims}");
        assert!(file(&format!("{rule}dag = 'a'")).warnings.is_empty(), "{claims}");
        file(&format!("[[rule]]\ndeny = true\n{claims}\n"));
    }
    // The team that an identity is made of says nothing about who may have it.
    assert!(error("[[rule]]\nidentity = 'x-${team}'\ntag = 'a'").contains("allow_author_claims"));
}

#[test]
fn a_rule_that_can_never_match_is_an_error() {
    let pair = |first: &str, second: &str| format!("[[rule]]\nname = 'one'\n{first}\n[[rule]]\nname = 'two'\n{second}\n");
    for (first, second) in [
        ("identity = 'x'", "identity = 'y'\ndag = 'a'"),
        ("identity = 'x'", "deny = true\npath = 'a'"),
        ("identity = 'x'\ndag = '*'\ntask = ['a', '**']", "identity = 'y'\ndag = 'a'"),
        ("identity = 'x'\ndag = ['a', 'b']", "identity = 'y'\ndag = 'b'\ntask = 'c'"),
        ("identity = 'x'\ndag = 'b'", "deny = true\ndag = 'b'\npath = 'c'"),
        ("deny = true\npath = 'a'", "identity = 'y'\npath = 'a'\ndag = 'b'"),
        ("identity = 'x'\nrole = ['a', 'b']", "identity = 'y'\nrole = 'b'"),
        ("identity = 'x'\nrun_as_user = 0", "identity = 'y'\nrun_as_user = 'root'"),
        ("identity = 'x-${team}'", "identity = 'y'\nteam = 'b'"),
    ] {
        let error = error(&pair(first, second));
        assert!(error.contains("[[rule]] \"two\": can never match: rule `one` before it"), "{first} / {second}: {error}");
        assert!(error.ends_with("move it before `one`, or remove it"), "{error}");
    }
    for (first, second) in [
        ("identity = 'x'\ndag = 'b'", "identity = 'y'\ndag = ['a', 'b']"),
        // Where the path is not known, the second denies.
        ("identity = 'x'\npath = 'a'", "deny = true\npath = 'a'"),
        ("identity = 'x'\npath = '**'", "identity = 'y'\ndag = 'a'"),
        ("identity = 'x'\nrole = 'a'", "identity = 'y'\nrole = 'a'\npermission = 'can_read'"),
        ("identity = 'x-${team}'", "identity = 'y'\ndag = 'a'"),
    ] {
        file(&pair(first, second));
    }
}

#[test]
fn a_rule_for_everything_must_be_meant() {
    assert!(error("[[rule]]\nidentity = 'x'\n").contains("make it the last rule and name it \"catch-all\""));
    let rules = file("[[rule]]\nname = 'catch-all'\nidentity = 'x'\n").rules;
    assert_eq!(dag("any").of(&rules).unwrap(), "x");
}

#[test]
fn a_wrong_rule_says_where_and_what_to_write() {
    for (rule, part) in [
        ("dag = 'a'", "airflow.toml:3: [[rule]] number 1: gives nothing; add identity = \"...\" or deny = true"),
        ("identity = 'x'\ndga = 'a'", "airflow.toml:5: [[rule]] number 1: unknown key `dga`; did you mean `dag`?"),
        ("identity = 'x'\ndag = 'a'\nruntype = 'manual'", "did you mean `run_type`?"),
        ("name = 'p'\nidentity = 'x'\ndag = 'a'\nallow_author_claim = true", "[[rule]] \"p\": unknown key"),
        ("identity = 'x'\ndeny = true\ndag = 'a'", "keep one of identity and deny = true"),
        ("identity = 'deny'\ndag = 'a'", "write deny = true instead of identity"),
        ("identity = 'My_Name'\ndag = 'a'", "`identity` = \"My_Name\": is no Consul service name"),
        ("identity = 'a-${dagg}'\ndag = 'a'", "did you mean ${dag}?"),
        ("identity = 'x'\ndag = 'a'\nmax_identities = 5", "remove it"),
        ("deny = true\ndag = 'a'\nmax_identities = 5", "the rule gives no identity"),
        ("identity = 'x-${dag}'\ndag = 'a'\nmax_identities = 0", "write a whole number of 1 to 10000"),
        ("identity = 'x'\ndag = 'a'\npermission = 'can_edit'", "says nothing without `role`"),
        ("identity = 'x'\ndag = []", "list at least one value"),
        ("identity = 'x'\ndag = ['a', '']", "is empty"),
        ("identity = 'x'\nteam = ['fin*']", "looks like a glob"),
        ("identity = 'x'\npath = ['/opt/dags/**']", "relative to the bundle"),
        ("identity = 'x'\nrun_as_user = 'no-such-user-here'", "this host has no such user"),
        ("name = 'default'\nidentity = 'x'\ndag = 'a'", "choose another name"),
    ] {
        let error = error(&format!("[[rule]]\n{rule}\n"));
        assert!(error.contains(part), "{rule}: {error}");
    }
    let twice = "[[rule]]\nname = 'rule-2'\ndeny = true\ndag = 'a'\n[[rule]]\ndeny = true\ndag = 'b'\n";
    assert!(error(twice).contains("the name `rule-2` is used twice"));
    assert!(error("[[rules]]\ndag = 'a'").contains("unknown key `rules`; did you mean `rule`?"));
}

#[test]
fn a_fact_that_the_file_has_no_source_for_is_an_error() {
    for (text, part) in [
        ("[[rule]]\nidentity = 'x'\npath = 'a'", "needs `path`, which only the catalog tells, and there is none; add catalog"),
        ("[[rule]]\nidentity = 'x-${team}'\ndag = 'a'", "needs `team`"),
        ("[[rule]]\ndeny = true\nqueue = 'a'", "add queues = [\"default\"]"),
        ("[[rule]]\nidentity = 'x-${queue}'\ndag = 'a'", "add queues = [\"default\"]"),
    ] {
        let error = Rules::parse(text, Path::new(PATH)).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_templated_identity_is_bounded_and_belongs_to_one_value() {
    let rules = file("[[rule]]\nname = 'ml'\nidentity = 'ml-${dag}'\ndag = ['ml_*', 'x*']\nmax_identities = 2\n").rules;
    let mut names = Names::default();
    let mut ask = |name: &str| dag(name).with(|facts| rules.decide(facts, &mut names)).map(|grant| grant.identity().to_string());
    let first = ask("ml_a").unwrap();
    assert!(first.starts_with("ml-ml-a-"), "{first}");
    assert_eq!(ask("ml_a").unwrap(), first);
    ask("xb").unwrap();
    let refusal = ask("ml_c").unwrap_err();
    assert!(refusal.why.contains("has given 2 identities") && refusal.why.contains("\"ml_c\""), "{}", refusal.why);
    assert_eq!(&*refusal.remedy, "raise `max_identities` of rule `ml`, or narrow its conditions");
    assert_eq!(ask("ml_a").unwrap(), first);
}

#[test]
fn a_dag_cannot_name_itself_into_an_identity_of_others() {
    let text = "default = 'airflow-other'\n[[component]]\nname = 'airflow-scheduler'\nunit = 'airflow-scheduler.service'\n\
                [[rule]]\nidentity = 'airflow-payroll'\ndag = ['payroll_*']\n\
                [[rule]]\nname = 'rest'\nidentity = 'airflow-${dag}'\n";
    let mut rules = file(text).rules;
    rules.reserve("airflow-worker", "the sidecar's own service");
    for (name, owner) in [
        ("scheduler", "the component `airflow-scheduler`"),
        ("payroll", "the identity of rule `rule-1`"),
        ("other", "the identity of `default`"),
        ("worker", "the sidecar's own service"),
    ] {
        let refusal = dag(name).of(&rules).unwrap_err();
        assert!(refusal.why.ends_with(&format!("for {:?}, which is {owner}", name)), "{}", refusal.why);
    }
    assert_eq!(dag("etl").of(&rules).unwrap(), "airflow-etl");
}

#[test]
fn a_team_or_queue_in_an_identity_must_be_known() {
    let rules = file("[[rule]]\nidentity = 't-${team}-${queue}'\ndag = '*'\n").rules;
    assert_eq!(Asked::default().of(&rules).unwrap(), "t-fin-default");
    for asked in [dag("hr_sync"), dag("bare"), dag("not_in_catalog"), Asked { queues: &["a", "b"], ..Asked::default() }] {
        assert_eq!(&*asked.of(&rules).unwrap_err().rule, "default");
    }
}

#[test]
fn an_explanation_shows_every_rule_with_the_first_condition_that_failed() {
    let rules = file(
        "[[rule]]\nname = 'hr'\nidentity = 'hr'\ndag = ['payroll_*']\npath = ['hr/**']\ntag = ['x']\n\
         [[rule]]\nname = 'role'\nidentity = 'r'\nrole = 'audit'\n\
         [[rule]]\nname = 'fin'\nidentity = 'fin-${dag}'\nteam = 'fin'\ntag = 'mesh:etl'\n\
         [[rule]]\nname = 'all'\ndeny = true\n",
    )
    .rules;
    let told = |asked: &Asked<'_>| asked.with(|facts| serde_json::to_value(rules.explain(facts, &Names::default())).unwrap());
    let told_one = told(&Asked::default());
    assert_eq!(told_one["winner"], "fin");
    assert!(told_one["identity"].as_str().unwrap().starts_with("fin-payroll-daily-"));
    assert_eq!(
        told_one["rules"][0],
        serde_json::json!({"rule": "hr", "effect": "hr", "trust": "author", "matched": false, "fail_closed": null,
            "failed": {"key": "path", "wanted": "hr/**", "had": "\"finance/payroll.py\"", "trust": "deployment"}})
    );
    assert_eq!(told_one["rules"][1]["failed"]["wanted"], "can_edit held by audit");
    assert_eq!(told_one["rules"][1]["failed"]["had"], "\"finance\"");
    assert_eq!((&told_one["rules"][2]["matched"], &told_one["rules"][2]["trust"]), (&true.into(), &"author".into()));
    assert_eq!(told_one["rules"][3]["trust"], serde_json::Value::Null);

    let told_two = told(&dag("not_in_catalog"));
    assert_eq!((&told_two["winner"], &told_two["identity"]), (&"all".into(), &serde_json::Value::Null));
    assert_eq!(told_two["denied"], "rule `all` denies it");
    assert_eq!(told_two["rules"][1]["failed"]["had"], "unknown: the catalog does not have this DAG");
}

#[test]
fn an_explanation_gives_no_name_away() {
    let rules = file("[[rule]]\nidentity = 'x-${dag}'\ndag = '*'\nmax_identities = 1\n").rules;
    let mut names = Names::default();
    dag("a").with(|facts| rules.explain(facts, &names));
    dag("b").with(|facts| rules.decide(facts, &mut names)).unwrap();
    let told = dag("a").with(|facts| rules.explain(facts, &names));
    assert!(told.identity.is_none() && told.denied.unwrap().contains("max_identities"));
}

#[test]
fn what_is_weak_is_said() {
    let warnings =
        file("accept_titles = true\n[[component]]\nname = 'w'\ntitle = 'airflow*'\n[[rule]]\nidentity = '${dag}'\ndag = 'a*'\n")
            .warnings;
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].starts_with("accept_titles") && warnings[1].starts_with("component `w`"));
    assert!(warnings[2].contains("choose any service's name"));
}

#[test]
fn the_same_component_twice_is_an_error_and_two_units_of_one_are_not() {
    let unit = |unit: &str| format!("[[component]]\nname = 'w'\nunit = '{unit}.service'\n");
    assert_eq!(file(&(unit("a") + &unit("b"))).components.len(), 2);
    assert!(error(&(unit("a") + &unit("a"))).contains("says the same as one before it"));
}

#[test]
fn a_file_is_read_within_its_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(PATH);
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Rules::load(&path)
    };
    assert_eq!(load(b"default = 'x'\n").unwrap().settings.fallback, Fallback::Identity("x".into()));
    assert!(matches!(load(b"# \xff"), Err(RulesError::Encoding { at: 2, .. })));
    assert!(matches!(load(&vec![b'\n'; usize::try_from(RULES_BYTES_MAX).unwrap() + 1]), Err(RulesError::TooLarge { .. })));
    assert!(matches!(Rules::load(folder.path()), Err(RulesError::Read { .. })));
    let many: String = (0..=RULES_MAX).map(|n| format!("[[rule]]\ndeny = true\ndag = 'd{n}'\n")).collect();
    assert!(error(&many).contains("1001 tables are more than 1000"));
}
