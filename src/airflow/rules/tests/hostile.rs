//! Files and facts that somebody made up to do harm.

use proptest::prelude::*;

use super::*;

/// Text that gets past the first error more often than noise does.
fn toml_like() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "name",
        "identity",
        "dag",
        "path",
        "team",
        "queue",
        "run_type",
        "run_as_user",
        "role",
        "permission",
        "tag",
        "deny",
        "unit",
        "user",
        "title",
        "max_identities",
        "socket",
        "default",
        "queues",
        "catalog",
        "x",
    ]);
    let value = prop_oneof![
        "'[a-z*?{}$./@-]{0,12}'",
        "\\['[a-z*]{0,4}', '[a-z\\[\\]!]{0,4}'\\]",
        Just("true".to_owned()),
        Just("-99999999999999999999".to_owned()),
        Just("'x-${dag}'".to_owned()),
        Just("{a = 1}".to_owned()),
        Just("[[]]".to_owned()),
        "\\PC{0,8}",
    ];
    let line = prop_oneof![
        6 => (key, value).prop_map(|(key, value)| format!("{key} = {value}")),
        1 => Just("[[rule]]".to_owned()),
        1 => Just("[[component]]".to_owned()),
        1 => Just("[rule]".to_owned()),
    ];
    prop::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn hostile_files_never_panic(noise in "\\PC{0,200}", text in toml_like()) {
        for text in [noise, text] {
            if let Ok(file) = Rules::parse(&text, Path::new(PATH)) {
                let _ = Asked::default().of(&file.rules);
            }
        }
    }

    #[test]
    fn hostile_facts_never_panic_and_never_share_an_identity(
        tasks in prop::collection::vec((".{0,80}", "[a-b_.-]{0,3}", ".{0,20}"), 1..20),
    ) {
        let rules = file(
            "[[rule]]\nidentity = 'a-${dag}'\nrun_type = 'manual'\n[[rule]]\ndeny = true\ndag = '*b'\npath = '**'\n\
             [[rule]]\nname = 'all'\nidentity = 'a-${task}'\nmax_identities = 10000\n",
        )
        .rules;
        let mut names = Names::default();
        let mut owners = BTreeMap::new();
        for (dag, task, run) in &tasks {
            let asked = Asked { dag, task, run, ..Asked::default() };
            let Ok(grant) = asked.with(|facts| rules.decide(facts, &mut names)) else { continue };
            let owner = if &**grant.rule() == "all" { ("task", task) } else { ("dag", dag) };
            prop_assert_eq!(*owners.entry(grant.identity().clone()).or_insert(owner), owner);
        }
    }
}

#[test]
fn deep_nesting_is_an_error_and_no_overflow() {
    for text in
        ["a = ".to_owned() + &"[".repeat(200_000), "a.".repeat(100_000) + "b = 1", "a = ".to_owned() + &"{a=".repeat(100_000)]
    {
        assert!(Rules::parse(&text, Path::new(PATH)).is_err());
    }
}
