use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use dvpn_common::{contract::ProvisionRequest, keys::PublicKey};
use tempfile::TempDir;

use super::{Error, Fallback, Script, Untrusted, run::redacted};
use dvpn_core::config::Secret;

const TOKEN: &str = "dev_very-secret-token";
/// For scripts that end by themselves, on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

fn request() -> ProvisionRequest {
    ProvisionRequest {
        user_id: "0123456789abcdef0123456789abcdef".parse().unwrap(),
        token: TOKEN.to_owned(),
        public_key: PublicKey::from_bytes([7; 32]).unwrap(),
        proof: None,
        timeout_seconds: 60,
    }
}

/// A script of these lines in a directory of its own.
struct Bed {
    directory: TempDir,
    script: PathBuf,
}

impl Bed {
    fn new(lines: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script.sh");
        fs::write(&script, format!("#!/bin/bash\n{lines}\n")).unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        Self { directory, script }
    }

    fn fallback(&self, timeout: Duration) -> Fallback {
        Fallback {
            control_plane: None,
            script: self.script.clone(),
            url: "https://orchestrator.test/".parse().unwrap(),
            ca_file: Some("/etc/ca.pem".into()),
            timeout,
        }
    }

    async fn run(&self, timeout: Duration) -> Result<Vec<u8>, Error> {
        self.fallback(timeout).provision(&request()).await
    }

    async fn answer(&self) -> String {
        String::from_utf8(self.run(PATIENCE).await.unwrap()).unwrap()
    }

    /// The process id that the script wrote, once it is there.
    async fn pid_in(&self, file: &str) -> i32 {
        let path = self.directory.path().join(file);
        tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(pid) = fs::read_to_string(&path)
                    .ok()
                    .and_then(|text| text.strip_suffix('\n').map(str::to_owned))
                {
                    return pid.parse().unwrap();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap()
    }
}

/// Whether this process itself was given a descriptor that every program it starts gets too.
fn passed_on(number: &str) -> bool {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
        return false;
    };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    u32::from_str_radix(flags.trim(), 8).unwrap() & CLOSE_ON_EXEC == 0
}

/// Waits until a process is gone; a zombie that nobody collected yet does not run any more.
async fn wait_until_gone(pid: i32) {
    let stat = format!("/proc/{pid}/stat");
    tokio::time::timeout(PATIENCE, async {
        while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("process {pid} still runs"));
}

#[tokio::test]
async fn the_request_comes_on_standard_input_and_the_answer_from_standard_output() {
    let answer = Bed::new("cat; echo; echo noise >&2").answer().await;
    let read: ProvisionRequest = serde_json::from_str(&answer).unwrap();
    assert_eq!((read.token.as_str(), read.timeout_seconds), (TOKEN, 60));
    assert_eq!(read.public_key, request().public_key);
}

#[tokio::test]
async fn the_script_has_four_variables_no_arguments_no_descriptors_of_ours_and_its_own_group() {
    let lines = "cat >/dev/null; env | sort; echo \"arguments: $#\"; echo \"cwd: $PWD\"
        for f in /proc/$$/fd/*; do printf 'descriptor %s ' \"${f##*/}\"; readlink \"$f\" || echo gone; done
        echo \"files: $(ulimit -n) core: $(ulimit -c)\"; echo \"group: $(cut -d' ' -f5 /proc/$$/stat) $$\"";
    let bed = Bed::new(lines);
    // A descriptor of ours that a careless spawn would pass on.
    let ours = fs::File::open("/etc/passwd").unwrap();
    let answer = bed.answer().await;
    drop(ours);
    let variables: Vec<&str> = answer.lines().filter(|line| line.contains('=')).collect();
    let names: Vec<&str> = variables
        .iter()
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    // PWD, SHLVL and _ are bash's own.
    assert_eq!(
        names,
        [
            "FALLBACK_CA_CERT",
            "FALLBACK_ORCHESTRATOR_URL",
            "LANG",
            "PATH",
            "PWD",
            "SHLVL",
            "_"
        ],
        "{answer}"
    );
    assert!(!answer.contains(TOKEN), "{answer}");
    assert!(answer.contains("FALLBACK_ORCHESTRATOR_URL=https://orchestrator.test/\n"));
    assert!(answer.contains("arguments: 0\n"), "{answer}");
    let real = bed.directory.path().canonicalize().unwrap();
    assert!(answer.contains(&format!("cwd: {}\n", real.display())), "{answer}");
    // Standard streams, bash's own view of the script, and what whoever started this test left open for everybody.
    for line in answer.lines().filter_map(|line| line.strip_prefix("descriptor ")) {
        let (number, target) = line.split_once(' ').unwrap();
        let expected = ["0", "1", "2"].contains(&number)
            || target.ends_with("/script.sh")
            || target == "gone"
            || passed_on(number);
        assert!(expected, "descriptor {line} in {answer}");
    }
    assert!(
        answer.contains("core: 0\n") && answer.contains("files: 1024"),
        "{answer}"
    );
    let (_, group) = answer.split_once("group: ").unwrap();
    let (group, own) = group.trim().split_once(' ').unwrap();
    assert_eq!(group, own, "a process group of its own");
}

#[tokio::test]
async fn a_script_that_hangs_is_killed_with_everything_it_started() {
    let bed = Bed::new("sleep 1000 & echo $! >child; echo $$ >own; sleep 1000");
    let begun = Instant::now();
    let error = bed.run(Duration::from_secs(2)).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut(_)), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    wait_until_gone(bed.pid_in("own").await).await;
    wait_until_gone(bed.pid_in("child").await).await;
}

#[tokio::test]
async fn a_cancelled_run_is_killed_with_everything_it_started() {
    let bed = Bed::new("sleep 1000 & echo $! >child; echo $$ >own; sleep 1000");
    let fallback = bed.fallback(PATIENCE);
    let task = tokio::spawn(async move { fallback.provision(&request()).await });
    let (own, child) = (bed.pid_in("own").await, bed.pid_in("child").await);
    assert!(Path::new(&format!("/proc/{child}")).exists());
    task.abort();
    wait_until_gone(own).await;
    wait_until_gone(child).await;
}

#[tokio::test]
async fn ten_megabytes_of_output_are_refused_and_not_read() {
    let bed = Bed::new("echo $$ >own; head -c 10000000 /dev/zero; sleep 1000");
    let error = bed.run(PATIENCE).await.unwrap_err();
    assert!(matches!(error, Error::TooMuch), "{error}");
    wait_until_gone(bed.pid_in("own").await).await;
    // The limit itself passes.
    assert_eq!(Bed::new("head -c 65536 /dev/zero").answer().await.len(), 65536);
    // Complaints without end block nobody and are not kept.
    let loud = Bed::new("head -c 10000000 /dev/zero >&2; echo '{}'");
    assert_eq!(loud.answer().await, "{}\n");
}

#[tokio::test]
async fn a_failure_after_a_good_answer_is_a_failure_and_its_words_are_kept_without_the_token() {
    let error = Bed::new(&format!(
        "cat >/dev/null; echo '{{}}'; echo 'no room for {TOKEN}' >&2; exit 1"
    ))
    .run(PATIENCE)
    .await
    .unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    let text = dvpn_core::Failure::from(error).to_string();
    assert!(text.contains("no room for [token]") && !text.contains(TOKEN), "{text}");
    let killed = Bed::new("echo '{}'; kill -9 $$").run(PATIENCE).await.unwrap_err();
    assert!(matches!(killed, Error::Failed { .. }), "{killed}");
}

#[tokio::test]
async fn a_child_in_the_background_is_killed_and_the_answer_counts() {
    let bed = Bed::new("sleep 1000 & echo $! >child; echo '{}'");
    assert_eq!(bed.answer().await, "{}\n");
    wait_until_gone(bed.pid_in("child").await).await;
}

#[tokio::test]
async fn a_child_that_left_the_group_with_the_output_open_is_ended_and_not_waited_for() {
    let bed =
        Bed::new("setsid sh -c 'echo $$ >child; exec sleep 30' & while [ ! -s child ]; do sleep 0.05; done; echo '{}'");
    let begun = Instant::now();
    assert_eq!(bed.answer().await, "{}\n");
    assert!(begun.elapsed() < Duration::from_secs(25));
    wait_until_gone(bed.pid_in("child").await).await;
}

/// Leaves the group and the session, twice over, with a parent that is gone, and says so.
const ESCAPE: &str =
    "setsid sh -c '(setsid sh -c \"echo \\$\\$ >far; exec sleep 1000\" &) ; echo $$ >near; exec sleep 1000' \
    </dev/null >/dev/null 2>&1 &
    while [ ! -s near ] || [ ! -s far ]; do sleep 0.02; done";

#[tokio::test]
async fn whoever_leaves_the_group_and_the_session_is_ended_too() {
    for (end, cancelled) in [
        ("echo '{}'", false),
        ("exit 1", false),
        ("sleep 1000", false),
        ("sleep 1000", true),
    ] {
        let bed = Bed::new(&format!("{ESCAPE}\n{end}"));
        let fallback = bed.fallback(if end == "sleep 1000" && !cancelled {
            Duration::from_secs(5)
        } else {
            PATIENCE
        });
        let task = tokio::spawn(async move { fallback.provision(&request()).await });
        let (near, far) = (bed.pid_in("near").await, bed.pid_in("far").await);
        if cancelled {
            task.abort();
        }
        let ended = task.await;
        assert_eq!(ended.is_err(), cancelled);
        if let Ok(answer) = ended {
            assert_eq!(answer.is_ok(), end.starts_with("echo"), "{end}");
        }
        for pid in [near, far] {
            wait_until_gone(pid).await;
            // Nor is a dead one left for ever.
            let reaped = tokio::time::timeout(PATIENCE, async {
                while Path::new(&format!("/proc/{pid}")).exists() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
            reaped.await.unwrap_or_else(|_| panic!("{pid} is a zombie"));
        }
    }
}

#[tokio::test]
async fn a_script_that_does_not_read_or_closes_its_output_is_no_problem() {
    assert_eq!(Bed::new("exec <&-; echo '{}'").answer().await, "{}\n");
    assert_eq!(Bed::new("echo '{}'; exec >&- 2>&-; sleep 0.2").answer().await, "{}\n");
    let error = Bed::new("exec >&- 2>&-; sleep 1000")
        .run(Duration::from_secs(1))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TimedOut(_)), "{error}");
}

#[test]
fn a_script_that_somebody_else_could_change_is_not_run() {
    let bed = Bed::new("echo '{}'");
    Script::open(&bed.script).unwrap();
    for mode in [0o777, 0o775, 0o757] {
        fs::set_permissions(&bed.script, Permissions::from_mode(mode)).unwrap();
        assert!(
            matches!(Script::open(&bed.script), Err(Untrusted::Writable { .. })),
            "{mode:o}"
        );
    }
    fs::set_permissions(&bed.script, Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(
        Script::open(&bed.script),
        Err(Untrusted::NotExecutable { .. })
    ));
    fs::set_permissions(&bed.script, Permissions::from_mode(0o755)).unwrap();

    // Its directory, and one further up.
    let inner = bed.directory.path().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    let below = inner.join("script.sh");
    fs::copy(&bed.script, &below).unwrap();
    Script::open(&below).unwrap();
    for directory in [inner.as_path(), inner.parent().unwrap()] {
        fs::set_permissions(directory, Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Script::open(&below), Err(Untrusted::Writable { .. })));
        // Sticky is good enough for root alone.
        fs::set_permissions(directory, Permissions::from_mode(0o1777)).unwrap();
        assert!(Script::open_as(&below, true).is_ok());
        assert!(matches!(
            Script::open_as(&below, false),
            Err(Untrusted::Writable { .. })
        ));
        fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    }

    // Links, of the file and of a directory.
    let link = bed.directory.path().join("link.sh");
    symlink(&bed.script, &link).unwrap();
    assert!(matches!(Script::open(&link), Err(Untrusted::Open { .. })));
    let link = bed.directory.path().join("linked");
    symlink(&inner, &link).unwrap();
    assert!(matches!(
        Script::open(&link.join("script.sh")),
        Err(Untrusted::Open { .. })
    ));

    for bad in ["script.sh", "./script.sh", "", "/", "/.."] {
        assert!(Script::open(Path::new(bad)).is_err(), "{bad}");
    }
    let dotted = inner.join("../b/script.sh");
    assert!(matches!(Script::open(&dotted), Err(Untrusted::NotAbsolute { .. })));
    assert!(matches!(Script::open(&inner), Err(Untrusted::NotExecutable { .. })));
    let pipe = bed.directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o755)).unwrap();
    assert!(matches!(Script::open(&pipe), Err(Untrusted::NotExecutable { .. })));
    // Whoever the daemon runs as: the script is root's, and every directory above it.
    for mine in [bed.script.as_path(), bed.directory.path()] {
        std::os::unix::fs::chown(mine, Some(65534), None).unwrap();
        for root in [true, false] {
            // To who is not root the directory above, sticky, is the first thing that is wrong.
            let refused = Script::open_as(&bed.script, root);
            assert!(matches!(
                (root, refused),
                (true, Err(Untrusted::Owner { owner: 65534, .. })) | (false, Err(Untrusted::Writable { .. }))
            ));
        }
        std::os::unix::fs::chown(mine, Some(0), None).unwrap();
    }
}

#[tokio::test]
async fn what_was_checked_is_what_runs_even_if_the_path_leads_elsewhere_by_then() {
    let outer = tempfile::tempdir().unwrap();
    let checked = outer.path().join("checked");
    fs::create_dir(&checked).unwrap();
    let bed = Bed::new("echo '{\"which\":\"checked\"}'");
    fs::copy(&bed.script, checked.join("script.sh")).unwrap();
    let script = Script::open(&checked.join("script.sh")).unwrap();
    fs::rename(&checked, outer.path().join("moved")).unwrap();
    fs::create_dir(&checked).unwrap();
    fs::write(
        checked.join("script.sh"),
        "#!/bin/bash\necho '{\"which\":\"swapped\"}'\n",
    )
    .unwrap();
    fs::set_permissions(checked.join("script.sh"), Permissions::from_mode(0o755)).unwrap();
    let answer = super::run::run(&script, &[], b"{}", &Secret::new(TOKEN), PATIENCE)
        .await
        .unwrap();
    assert_eq!(answer, b"{\"which\":\"checked\"}\n");
}

#[test]
fn words_are_bounded_printable_and_without_the_token() {
    let secret = Secret::new(TOKEN);
    let said = format!("a\x1b[2J{TOKEN}\nb{}", "x".repeat(10_000));
    let clean = redacted(said.as_bytes(), &secret);
    assert!(
        clean.starts_with("a[2J[token]\nb") && clean.len() <= 8192,
        "{}",
        clean.len()
    );
    // A token across the limit is not shown in part.
    let said = format!("{}{TOKEN}", "x".repeat(8190));
    assert!(!redacted(said.as_bytes(), &secret).contains("dev"));
    // Nor one with something between its letters that is not shown.
    let said = TOKEN.replace('-', "-\x07");
    assert_eq!(redacted(said.as_bytes(), &secret), "[token]");
}

#[test]
fn no_part_of_a_token_is_shown_wherever_the_words_are_cut_off() {
    let secret = Secret::new(TOKEN);
    // Tokens before it, and what is not printable, make what is shown shorter than what was read.
    for before in ["", &TOKEN.repeat(9), &"\x07".repeat(500)] {
        for padding in 8100..8300 {
            let said = format!("{before}{}{TOKEN} and more", "x".repeat(padding));
            for cut in (0..=TOKEN.len()).map(|part| before.len() + padding + part) {
                let clean = redacted(&said.as_bytes()[..cut], &secret);
                assert!(
                    !clean.contains("dev") && clean.len() <= 8192,
                    "{} {padding} {cut}: {}",
                    before.len(),
                    &clean[8000..]
                );
            }
        }
    }
}

/// Through the pipe: more is said than is kept, with the token at every offset around where the keeping ends.
#[tokio::test]
async fn no_part_of_a_token_reaches_the_reason_of_a_failure_wherever_its_words_are_cut_off() {
    let kept = 2 * 8192 + TOKEN.len();
    for offset in 0..=TOKEN.len() {
        // All but the last lines is unprintable, so that what was read last is what is shown.
        let padding = kept - offset - 1;
        let bed = Bed::new(&format!(
            "t=$(cut -d'\"' -f8); {{ head -c {padding} /dev/zero; echo; printf '%s and more' \"$t\"; }} >&2; exit 1"
        ));
        let error = bed.run(PATIENCE).await.unwrap_err();
        let Error::Failed { said, .. } = &error else {
            panic!("{error}")
        };
        assert!(!said.contains("dev"), "{offset}: {said}");
    }
}
