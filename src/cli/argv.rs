//! Go's flag syntax turned into one canonical form: `--name=value`.
//!
//! Invariant: the result holds known flags of the command only, each with one value, so that what follows need not know
//! how Go, GNU or a unit file of an Envoy sidecar writes them. Knows no meaning of any flag but those that it drops or
//! refuses. Fails with a [`UsageError`] that names the flag and what to write instead.

use super::UsageError;

/// One flag that a command takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Takes a value.
    Value,
    /// `-b`, `-b=true`, `-b=false`.
    Switch,
}

/// The flags of one command, by long name.
pub(super) type Known = Vec<(String, Kind)>;

/// Flags after normalisation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Normal {
    /// For clap.
    pub(super) arguments: Vec<String>,
    /// What was written for Envoy and means nothing here, as written, without values.
    pub(super) ignored: Vec<String>,
}

/// Flags of `consul connect envoy` and `consul connect proxy` that steer Envoy, its bootstrap or xDS.
const FOR_ENVOY: &[(&str, Kind)] = &[
    ("envoy-binary", Kind::Value),
    ("grpc-addr", Kind::Value),
    ("grpc-ca-file", Kind::Value),
    ("grpc-ca-path", Kind::Value),
    ("no-central-config", Kind::Switch),
    ("ignore-envoy-compatibility", Kind::Switch),
    ("enable-config-gen-logging", Kind::Switch),
    ("node-name", Kind::Value),
    ("stale", Kind::Switch),
    ("pprof-addr", Kind::Value),
];

const NO_GATEWAY: &str = "ringfence is a sidecar for services and cannot be a gateway: keep Envoy for gateways";
const NO_REGISTRATION: &str = "ringfence registers nothing: put `connect { sidecar_service {} }` into the service's \
     definition, or write it as an own `connect-proxy` service, and load it with `consul services register`";
const NO_BOOTSTRAP: &str = "there is no Envoy and so no bootstrap: what is enforced stands under /snapshot on the admin port, \
     and `ringfence check` shows whether it will start";

/// Flags that ask for something else than a sidecar, with the sentence that refuses them.
const REFUSED: &[(&str, Kind, &str)] = &[
    ("gateway", Kind::Value, NO_GATEWAY),
    ("mesh-gateway", Kind::Switch, NO_GATEWAY),
    ("expose-servers", Kind::Switch, NO_GATEWAY),
    ("address", Kind::Value, NO_GATEWAY),
    ("wan-address", Kind::Value, NO_GATEWAY),
    ("bind-address", Kind::Value, NO_GATEWAY),
    ("deregister-after-critical", Kind::Value, NO_GATEWAY),
    ("register", Kind::Switch, NO_REGISTRATION),
    ("register-id", Kind::Value, NO_REGISTRATION),
    ("bootstrap", Kind::Switch, NO_BOOTSTRAP),
];

/// Most arguments that are looked at; a longer line is a mistake of whatever wrote it.
const ARGUMENTS_MAX: usize = 4_096;

/// Turns `arguments` (what follows the command's name) into canonical form. `envoy` admits flags and pass-through
/// arguments that were written for Envoy.
pub(super) fn normalise(arguments: &[String], known: &Known, envoy: bool) -> Result<Normal, UsageError> {
    if arguments.len() > ARGUMENTS_MAX {
        return Err(UsageError(format!("{} arguments are more than the {ARGUMENTS_MAX} that are read", arguments.len())));
    }
    let mut normal = Normal::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            pass_through(rest.as_slice(), envoy, &mut normal)?;
            break;
        }
        if matches!(argument.as_str(), "-h" | "-help" | "--help" | "-V" | "--version") {
            let canonical = if argument.starts_with("-V") || argument == "--version" { "--version" } else { "--help" };
            normal.arguments.push(canonical.to_owned());
            continue;
        }
        let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')).filter(|flag| !flag.is_empty())
        else {
            return Err(unexpected(argument, envoy));
        };
        let (name, attached) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let mut value_of = |kind| match (attached, kind) {
            (Some(value), _) => Ok(Some(value.to_owned())),
            (None, Kind::Switch) => Ok(None),
            (None, Kind::Value) => {
                rest.next().cloned().map(Some).ok_or_else(|| UsageError(format!("flag -{name} needs a value: -{name}=VALUE")))
            }
        };
        if let Some((_, kind)) = known.iter().find(|(known, _)| known == name) {
            normal.arguments.push(canonical(name, *kind, value_of(*kind)?)?);
        } else if let Some((_, kind, sentence)) = REFUSED.iter().find(|(refused, ..)| *refused == name) {
            // `-gateway=false` asks for nothing: tools that write every flag out do this.
            let asked = match (kind, value_of(*kind)?) {
                (Kind::Switch, Some(value)) => boolean(name, &value)?,
                _ => true,
            };
            if asked {
                return Err(UsageError(format!("flag -{name}: {sentence}")));
            }
        } else if let Some((_, kind)) = FOR_ENVOY.iter().find(|(ours, _)| envoy && *ours == name) {
            value_of(*kind)?;
            normal.ignored.push(format!("-{name}"));
        } else {
            return Err(unknown(name, known));
        }
    }
    Ok(normal)
}

/// Go's `strconv.ParseBool`.
pub(super) fn boolean(name: &str, value: &str) -> Result<bool, UsageError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(UsageError(format!("{name}: `{value}` is neither true nor false"))),
    }
}

fn canonical(name: &str, kind: Kind, value: Option<String>) -> Result<String, UsageError> {
    Ok(match (kind, value) {
        (Kind::Switch, Some(value)) => format!("--{name}={}", boolean(&format!("flag -{name}"), &value)?),
        (Kind::Switch, None) => format!("--{name}=true"),
        (Kind::Value, value) => format!("--{name}={}", value.unwrap_or_default()),
    })
}

fn pass_through(rest: &[String], envoy: bool, normal: &mut Normal) -> Result<(), UsageError> {
    match rest {
        [] => Ok(()),
        _ if envoy => {
            normal.ignored.push(format!("-- {}", rest.join(" ")));
            Ok(())
        }
        [first, ..] => Err(unexpected(first, envoy)),
    }
}

fn unexpected(argument: &str, proxy: bool) -> UsageError {
    let hint = if proxy { format!("; did you mean -sidecar-for {argument}?") } else { String::new() };
    UsageError(format!("unexpected argument `{argument}`{hint}"))
}

fn unknown(name: &str, known: &Known) -> UsageError {
    let names = known.iter().map(|(name, _)| name.as_str());
    match nearest(name, names) {
        Some(near) => UsageError(format!("unknown flag -{name}; did you mean -{near}? --help lists all flags")),
        None => UsageError(format!("unknown flag -{name}; --help lists all flags")),
    }
}

/// The candidate that is the fewest edits away, if it is near enough to be meant.
pub(super) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let edits_max = (word.chars().count() / 2).clamp(1, 4);
    candidates
        .map(|candidate| (edits(word, candidate), candidate))
        .filter(|(edits, _)| *edits <= edits_max)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        vec![
            ("sidecar-for".into(), Kind::Value),
            ("http-addr".into(), Kind::Value),
            ("token-file".into(), Kind::Value),
            ("log-json".into(), Kind::Switch),
        ]
    }

    fn run(line: &str) -> Result<Normal, UsageError> {
        let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        normalise(&arguments, &known(), true)
    }

    #[test]
    fn every_way_to_write_a_flag_is_the_same_flag() {
        for (line, wanted) in [
            ("-sidecar-for web", vec!["--sidecar-for=web"]),
            ("-sidecar-for=web", vec!["--sidecar-for=web"]),
            ("--sidecar-for web", vec!["--sidecar-for=web"]),
            ("--sidecar-for=web", vec!["--sidecar-for=web"]),
            ("-sidecar-for a -sidecar-for b", vec!["--sidecar-for=a", "--sidecar-for=b"]),
            ("-sidecar-for=a=b", vec!["--sidecar-for=a=b"]),
            ("-sidecar-for=", vec!["--sidecar-for="]),
            ("-sidecar-for -web", vec!["--sidecar-for=-web"]),
            ("-sidecar-for --", vec!["--sidecar-for=--"]),
            ("-log-json", vec!["--log-json=true"]),
            ("--log-json=T", vec!["--log-json=true"]),
            ("-log-json=0", vec!["--log-json=false"]),
            ("-log-json -sidecar-for web", vec!["--log-json=true", "--sidecar-for=web"]),
            ("-h", vec!["--help"]),
            ("-help", vec!["--help"]),
            ("--help", vec!["--help"]),
            ("-V", vec!["--version"]),
            ("", vec![]),
        ] {
            assert_eq!(run(line).expect(line).arguments, wanted, "{line}");
        }
    }

    #[test]
    fn what_only_envoy_understands_is_dropped_and_named() {
        let normal =
            run("-sidecar-for web -envoy-binary /usr/bin/envoy -grpc-addr=localhost:8502 -ignore-envoy-compatibility=true \
             -no-central-config -node-name n1 -- -l debug --concurrency 2")
            .expect("accepted");
        assert_eq!(normal.arguments, ["--sidecar-for=web"]);
        assert_eq!(
            normal.ignored,
            [
                "-envoy-binary",
                "-grpc-addr",
                "-ignore-envoy-compatibility",
                "-no-central-config",
                "-node-name",
                "-- -l debug --concurrency 2",
            ]
        );
    }

    #[test]
    fn what_is_no_sidecar_is_refused_with_the_reason() {
        for (line, word) in [
            ("-gateway=mesh -register", "gateway"),
            ("-gateway terminating", "gateway"),
            ("-mesh-gateway", "gateway"),
            ("-expose-servers", "gateway"),
            ("-address 10.0.0.1:8443", "gateway"),
            ("-wan-address=1.2.3.4:8443", "gateway"),
            ("-bind-address default=0.0.0.0:8443", "gateway"),
            ("-deregister-after-critical 6h", "gateway"),
            ("-register -sidecar-for web", "consul services register"),
            ("-register-id web-1", "consul services register"),
            ("-bootstrap", "/snapshot"),
        ] {
            let UsageError(text) = run(line).expect_err(line);
            assert!(text.contains(word), "{line}: {text}");
        }
        assert!(run("-mesh-gateway=false -bootstrap=false -sidecar-for web").is_ok(), "switched off asks for nothing");
    }

    #[test]
    fn mistakes_name_the_flag_and_the_nearest_one() {
        for (line, wanted) in [
            ("-sidecar-four web", "unknown flag -sidecar-four; did you mean -sidecar-for?"),
            ("--http-adr x", "unknown flag -http-adr; did you mean -http-addr?"),
            ("-zzz", "unknown flag -zzz; --help lists all flags"),
            ("-sidecar-for", "flag -sidecar-for needs a value"),
            ("-envoy-binary", "flag -envoy-binary needs a value"),
            ("web", "unexpected argument `web`; did you mean -sidecar-for web?"),
            ("-", "unexpected argument `-`"),
            ("-log-json=maybe", "flag -log-json: `maybe` is neither true nor false"),
        ] {
            let UsageError(text) = run(line).expect_err(line);
            assert!(text.starts_with(wanted), "{line}: {text}");
        }
    }

    #[test]
    fn a_command_without_envoy_in_its_past_takes_none_of_its_flags() {
        let arguments = ["-envoy-binary".to_owned(), "x".to_owned()];
        assert!(normalise(&arguments, &known(), false).is_err());
        let arguments = ["--".to_owned(), "x".to_owned()];
        assert!(normalise(&arguments, &known(), false).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec("[-a-z= ]{0,12}|\\PC{0,8}", 0..8)) {
            let _ = normalise(&line, &known(), true);
        }
    }
}
