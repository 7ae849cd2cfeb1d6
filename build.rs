//! Puts the functions of a release in the order of `src/order.txt`. With the feature `xds`: compiles Envoy's protobufs, which the
//! crate `envoy-types` ships, into one descriptor set for `prost-reflect`. So the JSON of a bootstrap or of `/config_dump` and the
//! prost types are of one version.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=Cargo.lock");
    order::write();
    #[cfg(feature = "xds")]
    descriptors::write();
}

mod order {
    use std::fmt::Write as _;
    use std::path::{Path, PathBuf};

    /// Written by `scripts/order`: a symbol's name a line, with `*` where it has a hash.
    const LIST: &str = "src/order.txt";
    /// `0` leaves functions as they come, for linkers that know no such scripts (mold, gold).
    const SWITCH: &str = "RINGFENCE_ORDER";

    /// A script for the linker that adds to its own (`INSERT`; lld and GNU ld know it): a section for each phase of the list, in
    /// front of all other code. Each function has a section of its own, but for aws-lc's assembly, which stays where it is; what
    /// only grows or begins something is `unlikely` to the compiler and runs at rest all the same.
    pub(super) fn write() {
        println!("cargo::rerun-if-changed={LIST}");
        println!("cargo::rerun-if-env-changed={SWITCH}");
        if std::env::var(SWITCH).as_deref() == Ok("0") {
            return;
        }
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let linux = std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux");
        if !linux || std::env::var("PROFILE").as_deref() != Ok("release") || is_counted(&out) {
            return;
        }
        let list = std::fs::read_to_string(LIST).unwrap_or_else(|error| panic!("{LIST}: {error}"));
        let script = out.join("order.ld");
        std::fs::write(&script, sections(&list)).expect("the build folder can be written to");
        println!("cargo::rustc-link-arg-bins=-T");
        println!("cargo::rustc-link-arg-bins={}", script.display());
    }

    /// The profile `counted` inherits `release`; its program is never run, and has many more functions to look through.
    fn is_counted(out: &Path) -> bool {
        // Below a profile's folder: build/PACKAGE/out.
        out.ancestors().nth(3).is_some_and(|folder| folder.ends_with("counted"))
    }

    fn sections(list: &str) -> String {
        let (mut script, mut phases) = ("SECTIONS\n{\n".to_owned(), 0);
        for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let written = if line.starts_with('[') {
                phases += 1;
                let end = if phases > 1 { "}\n" } else { "" };
                writeln!(script, "{end}.text.phase{phases} :\n{{")
            } else {
                assert!(phases > 0, "{LIST}: {line} stands before the first phase, such as [at rest]");
                writeln!(script, "*(.text.{line} .text.unlikely.{line})")
            };
            written.expect("a String takes it");
        }
        script + if phases > 0 { "}\n" } else { "" } + "}\nINSERT BEFORE .text;\n"
    }
}

#[cfg(feature = "xds")]
mod descriptors {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// The roots of imports under `envoy-types`' folder `proto`.
    const ROOTS: [&str; 7] =
        ["data-plane-api", "xds", "protoc-gen-validate", "googleapis", "cel-spec", "client_model", "opentelemetry-proto"];
    /// What a bootstrap, Consul's resources and the admin port are made of, under `data-plane-api/envoy`; what they import
    /// comes along.
    const PACKAGES: [&str; 32] = [
        "admin/v3",
        "config/bootstrap/v3",
        "config/cluster/v3",
        "config/endpoint/v3",
        "config/listener/v3",
        "config/route/v3",
        "extensions/access_loggers/file",
        "extensions/access_loggers/stream",
        "extensions/clusters/aggregate",
        "extensions/clusters/dns",
        "extensions/filters/http/router",
        "extensions/filters/http/health_check",
        "extensions/filters/http/rbac",
        "extensions/filters/http/grpc_stats",
        "extensions/filters/http/lua",
        "extensions/filters/http/ext_authz",
        "extensions/filters/http/wasm",
        "extensions/filters/listener/http_inspector",
        "extensions/filters/listener/original_dst",
        "extensions/filters/listener/proxy_protocol",
        "extensions/filters/listener/tls_inspector",
        "extensions/filters/network/connection_limit",
        "extensions/filters/network/ext_authz",
        "extensions/filters/network/http_connection_manager",
        "extensions/filters/network/local_ratelimit",
        "extensions/filters/network/rbac",
        "extensions/filters/network/sni_cluster",
        "extensions/filters/network/tcp_proxy",
        "extensions/filters/network/wasm",
        "extensions/transport_sockets",
        "extensions/upstreams/http",
        "service/discovery/v3",
    ];

    pub(super) fn write() {
        let proto = source_of("envoy-types").join("proto");
        let roots: Vec<PathBuf> = ROOTS.iter().map(|root| proto.join(root)).collect();
        let api = proto.join("data-plane-api");
        let mut files = Vec::new();
        for package in PACKAGES {
            collect(&api.join("envoy").join(package), &mut files);
        }
        files.sort();
        let mut compiler = protox::Compiler::new(roots).expect("the folders of Envoy's protobufs can be read");
        compiler.include_imports(true).open_files(files).expect("Envoy's protobufs compile");
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("envoy.binpb");
        std::fs::write(&out, compiler.encode_file_descriptor_set()).expect("the build folder can be written to");
    }

    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "proto") {
                files.push(path);
            }
        }
    }

    /// Where cargo keeps a dependency's source: vendored, in its registry, wherever.
    fn source_of(name: &str) -> PathBuf {
        // Metadata wants every package of the lock file, a build only those of its own target: where the others were never
        // downloaded, it may get them.
        let told = metadata(&["--offline"]).or_else(|offline| metadata(&[]).map_err(|online| format!("{offline}\n{online}")));
        let told = told.unwrap_or_else(|why| panic!("cargo metadata: {why}"));
        let told: serde_json::Value = serde_json::from_slice(&told).expect("cargo metadata is JSON");
        let packages = told["packages"].as_array().into_iter().flatten();
        let manifest = packages
            .filter(|package| package["name"] == name)
            .find_map(|package| package["manifest_path"].as_str())
            .unwrap_or_else(|| panic!("cargo metadata knows no {name}"));
        Path::new(manifest).parent().expect("a manifest lies in a folder").to_owned()
    }

    fn metadata(more: &[&str]) -> Result<Vec<u8>, String> {
        let cargo = std::env::var_os("CARGO").expect("cargo sets CARGO");
        let args = ["metadata", "--format-version", "1", "--locked"];
        let told = Command::new(cargo).args(args).args(more).output().expect("cargo can be run");
        if told.status.success() { Ok(told.stdout) } else { Err(String::from_utf8_lossy(&told.stderr).into_owned()) }
    }
}
