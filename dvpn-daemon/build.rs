//! Builds the eBPF object and leaves it at `$OUT_DIR/dvpn-ebpf` for `src/ebpf.rs` to embed.
//!
//! The host toolchain cannot build it: the bpf target has no prebuilt `core`, and linking needs bpf-linker. Routes, in
//! order:
//!
//! 1. `DVPN_EBPF_OBJECT=path`: an object built elsewhere.
//! 2. The system's own Rust of Debian (`/usr/bin/cargo`, packages rustc-web, cargo-web, rust-web-src), which unlocks
//!    `-Z build-std` by `RUSTC_BOOTSTRAP=1`.
//! 3. rustup's nightly with its `rust-src` component.
//!
//! Routes 2 and 3 need bpf-linker on `PATH` or where `scripts/lib/toolchain.sh` installs it. With no route the object
//! is empty, `ebpf::AVAILABLE` is false and the build says so; `DVPN_EBPF_REQUIRED=1` makes that an error. A route
//! that exists and fails is an error always.
// Cargo reads a build script's answers from its standard output.
#![allow(
    clippy::print_stdout,
    reason = "cargo reads a build script's answers from standard output"
)]

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The first Rust whose std sources build with the flags below, and the workspace's `rust-version`.
const RUST_MINOR: u32 = 95;
/// Version in the folder name that `scripts/lib/toolchain.sh` installs to.
const LINKER: &str = "bpf-linker-0.13.0";
const TARGET: &str = "bpfel-unknown-none";
/// Little-endian BPF, instruction set v3 (kernel 5.1), with BTF for the verifier's messages.
const RUSTFLAGS: &[&str] = &["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"];

/// A way to run a cargo that can build `core`.
struct Route {
    name: &'static str,
    /// Program and arguments before cargo's own.
    cargo: &'static [&'static str],
    /// The compiler to force, when cargo would find another one first.
    rustc: Option<&'static str>,
    /// Folder to put first in `PATH`.
    path: Option<&'static str>,
}

fn main() -> ExitCode {
    for name in ["DVPN_EBPF_OBJECT", "DVPN_EBPF_REQUIRED"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let out = PathBuf::from(variable("OUT_DIR")?);
    let object = out.join("dvpn-ebpf");
    if let Some(given) = env::var_os("DVPN_EBPF_OBJECT").filter(|value| !value.is_empty()) {
        let given = PathBuf::from(given);
        println!("cargo::rerun-if-changed={}", given.display());
        return copy(&given, &object);
    }

    let workspace = Path::new(&variable("CARGO_MANIFEST_DIR")?)
        .parent()
        .map(Path::to_path_buf)
        .ok_or("dvpn-daemon has no parent folder")?;
    // The object depends on dvpn-ebpf and on the no_std part of dvpn-common; the lock file pins aya-ebpf.
    for input in [
        "dvpn-ebpf",
        "dvpn-common/Cargo.toml",
        "dvpn-common/src/lib.rs",
        "dvpn-common/src/abi.rs",
        "dvpn-common/src/grant.rs",
        "dvpn-common/src/rate.rs",
        "dvpn-common/src/segments.rs",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    for input in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    match (find_linker(), find_route()) {
        (Some(linker), Some(route)) => build(&route, &linker, &workspace, &out, &object),
        (linker, route) => {
            let mut missing = Vec::new();
            if linker.is_none() {
                missing.push("bpf-linker (on PATH or in the cache)");
            }
            if route.is_none() {
                missing.push("a Rust with the sources of core (Debian's rustc-web, cargo-web and rust-web-src, or rustup's nightly with rust-src)");
            }
            unavailable(&missing.join(" and "), &object)
        }
    }
}

/// Leaves an empty object, loudly.
fn unavailable(missing: &str, object: &Path) -> Result<(), String> {
    let advice = format!(
        "the eBPF object was not built: missing {missing}; `scripts/lib/toolchain.sh` installs what is needed, or set DVPN_EBPF_OBJECT"
    );
    if env::var("DVPN_EBPF_REQUIRED").is_ok_and(|value| value == "1") {
        return Err(advice);
    }
    println!("cargo::warning={advice}; this daemon will have no traffic counters");
    // A file that never exists makes cargo ask again at the next build, when the tools may be there.
    println!("cargo::rerun-if-changed={}", object.with_extension("missing").display());
    fs::write(object, []).map_err(|error| format!("cannot write {}: {error}", object.display()))
}

fn build(route: &Route, linker: &Path, workspace: &Path, out: &Path, object: &Path) -> Result<(), String> {
    let target_dir = out.join("ebpf-target");
    let (program, words) = route.cargo.split_first().ok_or("a route without a program")?;
    let mut cargo = Command::new(program);
    cargo.args(words);
    scrub(&mut cargo);
    cargo.env("RUSTC_BOOTSTRAP", "1");
    let mut flags = vec![format!("-Clinker={}", linker.display())];
    flags.extend(RUSTFLAGS.iter().map(ToString::to_string));
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    if let Some(rustc) = route.rustc {
        cargo.env("RUSTC", rustc);
    }
    if let Some(first) = route.path {
        let rest = env::var("PATH").unwrap_or_default();
        cargo.env("PATH", format!("{first}:{rest}"));
    }
    cargo
        .current_dir(workspace)
        .args([
            "build",
            "--locked",
            "--package",
            "dvpn-ebpf",
            "--bin",
            "dvpn-ebpf",
            "--release",
        ])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        // One unit and full LTO let bpf-linker inline everything; the debug information becomes BTF.
        .args([
            "--config",
            "profile.release.lto='fat'",
            "--config",
            "profile.release.codegen-units=1",
        ])
        .args(["--config", "profile.release.strip='none'"]);
    let result = cargo
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !result.status.success() {
        let log = String::from_utf8_lossy(&result.stderr).into_owned();
        eprintln!("{log}");
        let tail: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = tail
            .iter()
            .rev()
            .take(12)
            .rev()
            .copied()
            .collect::<Vec<_>>()
            .join(" | ");
        return Err(format!(
            "the eBPF object did not build with {} and {}: {tail}. DVPN_EBPF_OBJECT takes one built elsewhere",
            route.name,
            linker.display()
        ));
    }
    copy(&target_dir.join(TARGET).join("release/dvpn-ebpf"), object)
}

/// Takes away what the outer cargo set for its own children and what would reach the bpf target by mistake.
fn scrub(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        // Where the registry is and how it is reached holds for the inner cargo too.
        let network = [
            "CARGO_HOME",
            "CARGO_REGISTRY_",
            "CARGO_REGISTRIES_",
            "CARGO_SOURCE_",
            "CARGO_NET_",
            "CARGO_HTTP_",
        ];
        let cargo_own = name.starts_with("CARGO") && !network.iter().any(|prefix| name.starts_with(prefix));
        let compiler = name.starts_with("RUST") && name != "RUSTUP_HOME";
        let script = [
            "PROFILE",
            "OPT_LEVEL",
            "DEBUG",
            "TARGET",
            "HOST",
            "NUM_JOBS",
            "OUT_DIR",
            "LD_LIBRARY_PATH",
        ];
        if cargo_own || compiler || script.contains(&name) || name.starts_with("DEP_") {
            command.env_remove(name);
        }
    }
}

fn find_route() -> Option<Route> {
    if Path::new("/usr/bin/cargo").exists() && has_core_sources(&["/usr/bin/rustc"]) {
        return Some(Route {
            name: "the system's Rust",
            cargo: &["/usr/bin/cargo"],
            rustc: Some("/usr/bin/rustc"),
            path: Some("/usr/bin"),
        });
    }
    has_core_sources(&["rustup", "run", "nightly", "rustc"]).then_some(Route {
        name: "rustup's nightly",
        cargo: &["rustup", "run", "nightly", "cargo"],
        rustc: None,
        path: None,
    })
}

/// Whether this compiler is new enough and has the sources of `core` beside it.
fn has_core_sources(rustc: &[&str]) -> bool {
    let minor = answer(rustc, &["--version"])
        .and_then(|version| version.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok()));
    let sources = answer(rustc, &["--print", "sysroot"])
        .map(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml"));
    minor.is_some_and(|minor| minor >= RUST_MINOR) && sources.is_some_and(|manifest| manifest.exists())
}

fn answer(words: &[&str], arguments: &[&str]) -> Option<String> {
    let (program, rest) = words.split_first()?;
    let mut command = Command::new(program);
    scrub(&mut command);
    let output = command.args(rest).args(arguments).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn find_linker() -> Option<PathBuf> {
    let on_path = env::var_os("PATH")
        .into_iter()
        .flat_map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let cache = env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    on_path
        .chain(cache.map(|cache| cache.join("dvpn").join(LINKER).join("bin")))
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map_err(|error: io::Error| {
        format!(
            "cannot copy the eBPF object from {} to {}: {error}",
            from.display(),
            to.display()
        )
    })?;
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("cargo did not set {name}: {error}"))
}
