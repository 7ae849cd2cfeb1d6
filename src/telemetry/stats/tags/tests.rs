//! Tags beside what Envoy 1.40 made of the same names with the bootstrap that Consul 1.10 wrote.

use std::collections::BTreeSet;

use super::*;

/// `stats_tags` of a captured bootstrap.
fn bootstrap() -> Vec<StatTag> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/consul-1.10/xds/sidecar.bootstrap.json");
    let text = std::fs::read_to_string(path).expect("the fixture is there");
    let bootstrap: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let tags = bootstrap["stats_config"]["stats_tags"].as_array().expect("a list");
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    tags.iter()
        .map(|tag| StatTag {
            name: text(&tag["tag_name"]).expect("a name"),
            value: match text(&tag["regex"]) {
                Some(regex) => StatTagValue::Regex(regex),
                None => StatTagValue::Fixed(text(&tag["fixed_value"]).expect("a regex or a value")),
            },
        })
        .collect()
}

fn fixture(name: &str) -> String {
    let path = format!("{}/tests/fixtures/envoy-1.40/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).expect("the fixture is there")
}

/// Labels without their order, which means nothing.
fn series(family: &str, labels: &str) -> (String, BTreeSet<String>) {
    let labels = labels.split("\",").map(|label| label.trim_end_matches('"').to_owned()).filter(|label| !label.is_empty());
    (family.to_owned(), labels.collect())
}

#[test]
fn names_and_labels_are_those_of_envoy() {
    let mut tagger = Tagger::new(Dialect::Prometheus, &bootstrap(), true).expect("Consul's tags");
    let ours: BTreeSet<_> = fixture("stats.names")
        .lines()
        .map(|name| tagger.tag(name, 0))
        .map(|tagged| series(&tagged.name, &tagged.labels))
        .collect();
    let envoys = fixture("stats.prometheus");
    assert!(envoys.lines().count() > 50, "the fixture is whole");
    for line in envoys.lines() {
        let (family, labels) = line.trim_end_matches('}').split_once('{').expect("labels");
        // Of a histogram only the count is in the fixture.
        let wanted = series(family.strip_suffix("_ms_count").map_or(family, |_| family.trim_end_matches("_count")), labels);
        assert!(
            ours.contains(&wanted),
            "{line}\nbut: {:?}",
            ours.iter().filter(|(name, _)| *name == wanted.0).collect::<Vec<_>>()
        );
    }
}

#[test]
fn consuls_tags_are_those_of_its_bootstrap() {
    let captured: Vec<StatTag> = bootstrap().into_iter().filter(|tag| matches!(tag.value, StatTagValue::Regex(_))).collect();
    assert_eq!(of_consul(false), captured);
    assert!(of_consul(true).iter().all(|tag| tag.name.starts_with("consul.destination.") || tag.name.contains("upstream")));
}

#[test]
fn each_owner_has_its_fixed_tags_until_they_change() {
    let mut tagger = Tagger::new(Dialect::DogStatsd, &of_consul(true), true).expect("Consul's tags");
    let owner = |service: &str| vec![("consul.source.service".to_owned(), service.to_owned())];
    tagger.set_owners(vec![owner("web"), owner("db")]);
    let labels = |tagger: &mut Tagger, owner| tagger.tag("tcp.public_listener.x", owner).labels.to_string();
    assert_eq!(labels(&mut tagger, 0), "consul.source.service:web,envoy.tcp_prefix:public_listener");
    assert_eq!(labels(&mut tagger, 1), "consul.source.service:db,envoy.tcp_prefix:public_listener");
    tagger.set_owners(vec![owner("api")]);
    assert_eq!(labels(&mut tagger, 0), "consul.source.service:api,envoy.tcp_prefix:public_listener");
    assert_eq!(&*tagger.tag("server.live", 7).labels, "", "an owner without tags");
}

#[test]
fn an_empty_capture_is_an_empty_label_and_hostile_values_are_escaped() {
    let tag = |name: &str, regex: &str| StatTag { name: name.into(), value: StatTagValue::Regex(regex.into()) };
    let tags = [tag("a.b", r"^x\.((?:([^.]+)~)?y\.)"), tag("c", r"^x\.(?:h~)?y\.([\s\S]*)$"), tag("none", "^x")];
    let mut tagger = Tagger::new(Dialect::Prometheus, &tags, false).expect("well-formed");
    let tagged = tagger.tag("x.y.\"\\\nz", 0);
    assert_eq!((&*tagged.name, &*tagged.labels), ("envoy_x_", r#"a_b="",c="\"\\\nz""#));
    assert_eq!(&*tagger.tag("x.h~y.z", 0).labels, r#"a_b="h",c="z""#);
}

#[test]
fn what_cannot_be_used_is_named() {
    let tag = |regex: &str| StatTag { name: "mine".into(), value: StatTagValue::Regex(regex.into()) };
    let error = Tagger::new(Dialect::Prometheus, &[tag("(")], true).expect_err("refused");
    assert!(error.to_string().contains("mine") && error.to_string().contains("`(`"), "{error}");
    let error = Tagger::new(Dialect::Prometheus, &[tag("a"), tag("b")], true).expect_err("refused");
    assert!(matches!(error, TagError::Twice(name) if name == "mine"));
}

#[test]
fn what_is_remembered_has_an_end() {
    let mut tagger = Tagger::new(Dialect::Prometheus, &[], true).expect("Envoy's own tags");
    for index in 0..NAMES_MAX + 10 {
        tagger.tag(&format!("cluster.c{index}.x"), 0);
    }
    assert!(tagger.known.len() <= NAMES_MAX && tagger.texts.len() <= NAMES_MAX + 1);
}
