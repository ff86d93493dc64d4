//! The binary as an operator runs it, and the certificate script.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::{
    node::{Seen, TestNode, next},
    support::{Access, TestPool, client, client_key, make_certificates, refusal},
};

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dvpn-pool"));
    command
        .arg("serve")
        .env_clear()
        .env("DVPN_POOL_LISTEN", "127.0.0.1:0")
        .env("DVPN_POOL_TLS_CERT", directory.join("server.crt"))
        .arg("--tls-key")
        .arg(directory.join("server.key"))
        .arg("--database")
        .arg(directory.join("pool.db"));
    command
}

/// Starts the server and returns where it listens.
fn start(directory: &Path) -> (Process, Access) {
    let mut child = command(directory)
        .args(["--development", "--private-endpoints"])
        .env("DVPN_POOL_OPEN_REGISTRATION", "true")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = String::new();
    let base = loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended: {said}")).unwrap();
        said.push_str(&line);
        if let Some((_, rest)) = line.split_once("listening on ") {
            break rest.split_whitespace().next().unwrap().to_owned();
        }
    };
    assert!(said.contains("DEVELOPMENT POOL"), "{said}");
    std::thread::spawn(move || lines.for_each(drop));
    (
        Process(child),
        Access {
            base,
            client: client(&directory.join("dev-ca.crt")),
        },
    )
}

#[tokio::test]
async fn approvals_and_sequence_survive_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path(), &[]);
    let (mut process, access) = start(directory.path());
    let node = TestNode::new(&access, "node-a", 1).await;
    node.register().await;
    let mut events = node.open_stream().await;
    next(&mut events).await;
    let pool_key = node.register_until_listed().await.pool_key;
    let token = access.pay("user").await;
    let acknowledge = async {
        let event = next(&mut events).await;
        node.ack(event.sequence(), Vec::new()).await;
        event.sequence()
    };
    let (answer, sequence) = tokio::join!(access.approved("node-a", &token, client_key(1)), acknowledge);
    let (_, version) = access.list().await;
    process.0.kill().unwrap();
    process.0.wait().unwrap();

    let (mut process, access) = start(directory.path());
    assert!(
        access.listed_ids().await.is_empty(),
        "nothing is listed before it shows life"
    );
    node.move_to(&access);
    let mut events = node.open_stream().await;
    let Seen::Snapshot(snapshot) = next(&mut events).await else {
        panic!("a snapshot")
    };
    assert_eq!(snapshot.sequence, sequence);
    assert_eq!(snapshot.peers.len(), 1);
    assert_eq!(Some(&snapshot.peers[0].approval), answer.approval.as_ref());
    access.wait_for_list(&["node-a"]).await;
    assert!(access.list().await.1 > version, "the list's version grows");
    assert_eq!(node.register().await.pool_key, pool_key);
    assert!(access.verify(&token).await.contains("\"active\":true"));
    let acknowledge = async {
        let event = next(&mut events).await;
        node.ack(event.sequence(), Vec::new()).await;
        event.sequence()
    };
    let (_, later) = tokio::join!(access.approved("node-a", &token, client_key(2)), acknowledge);
    assert!(later > sequence);

    let terminated = Command::new("kill")
        .args(["-TERM", &process.0.id().to_string()])
        .status()
        .unwrap();
    assert!(terminated.success());
    assert!(
        process.0.wait().unwrap().success(),
        "SIGTERM is a clean end, open streams or not"
    );
}

#[test]
fn it_does_not_start_without_development() {
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path(), &[]);
    let output = command(directory.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--development"), "{said}");
    assert!(!directory.path().join("pool.db").exists());
}

#[test]
fn check_config_says_everything_that_is_wrong() {
    let check = |variables: &[(&str, &str)]| {
        Command::new(env!("CARGO_BIN_EXE_dvpn-pool"))
            .arg("--check-config")
            .env_clear()
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    };
    let output = check(&[
        ("DVPN_POOL_PAYMENT_URL", "http://pool.example"),
        ("DVPN_POOL_MAX_CONNECTIONS", "0"),
    ]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    for wrong in [
        "--listen",
        "--tls-cert",
        "--tls-key",
        "--database",
        "--development",
        "https://",
        "--max-connections",
    ] {
        assert!(said.contains(wrong), "{wrong} in {said}");
    }
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path(), &[]);
    let (cert, key) = (directory.path().join("server.crt"), directory.path().join("server.key"));
    let good = [
        ("DVPN_POOL_LISTEN", "127.0.0.1:0"),
        ("DVPN_POOL_TLS_CERT", cert.to_str().unwrap()),
        ("DVPN_POOL_TLS_KEY", key.to_str().unwrap()),
        ("DVPN_POOL_DATABASE", "/nowhere/pool.db"),
        ("DVPN_POOL_DEVELOPMENT", "true"),
    ];
    assert!(check(&good).status.success());
    let mut foreign = good;
    let authority = directory.path().join("dev-ca.key");
    foreign[2].1 = authority.to_str().unwrap();
    let output = check(&foreign);
    assert_eq!(output.status.code(), Some(78));
    assert!(String::from_utf8(output.stderr).unwrap().contains("belong together"));
}

#[test]
fn certificates_are_made_once_and_grow_by_name() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let read = || {
        ["dev-ca.crt", "dev-ca.key", "server.crt", "server.key"]
            .map(|name| std::fs::read(directory.path().join(name)).unwrap())
    };
    make_certificates(directory.path(), &["IP:203.0.113.10"]);
    let first = read();
    for name in ["dev-ca.key", "server.key"] {
        let mode = std::fs::metadata(directory.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    make_certificates(directory.path(), &[]);
    make_certificates(directory.path(), &["IP:203.0.113.10", "IP:::1"]);
    assert_eq!(read(), first, "nothing changes when nothing is missing");
    make_certificates(directory.path(), &["DNS:pool.example"]);
    let grown = read();
    assert_eq!(grown[..2], first[..2], "the authority stays");
    assert_ne!(grown[2], first[2]);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 5, "four files and the lock: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_strangers_do_not_disturb_the_pool() {
    let pool = TestPool::start(|_| {}).await;
    let address = pool.access.base.trim_start_matches("https://").to_owned();
    for garbage in [
        &b"GET /providers HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0x16, 3, 1, 0xff, 0xff, 1],
        &[0; 4096],
    ] {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(crate::support::DEADLINE)).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // A reset is as good an answer as a TLS alert; what must not come is HTTP.
        drop(stream.read_to_end(&mut answer));
        assert!(!answer.starts_with(b"HTTP"));
    }
    for (path, body) in [
        ("/providers/register", "{"),
        ("/approve", "\u{0}"),
        ("/payment", "null"),
        ("/payment/checkout/start", "1e999"),
    ] {
        let url = format!("{}{path}", pool.access.base);
        let response = pool.access.client.post(url).body(body).send().await.unwrap();
        assert_eq!(refusal(response).await.0, 400, "{path}");
    }
    assert_eq!(refusal(pool.access.get("/nothing").await).await.0, 404);
    assert_eq!(refusal(pool.access.get("/approve").await).await.0, 405);
    assert_eq!(pool.access.get("/health").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_above_the_limit_are_closed() {
    let pool = TestPool::start(|config| config.max_connections = 8).await;
    let address = pool.access.base.trim_start_matches("https://").to_owned();
    // An eighth of the limit is one connection of this address; which of the three it is, is the scheduler's choice.
    let held: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(&address).unwrap()).collect();
    for stream in &held {
        stream.set_nonblocking(true).unwrap();
    }
    let closed = || {
        held.iter()
            .filter(|stream| matches!(stream.peek(&mut [0]), Ok(0)))
            .count()
    };
    crate::support::eventually(|| async { closed() >= 2 }).await;
    assert_eq!(closed(), 2);
    drop(held);
    crate::support::eventually(|| async {
        pool.access
            .client
            .get(format!("{}/health", pool.access.base))
            .send()
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test]
async fn the_speed_test_sends_and_swallows_what_is_asked() {
    let pool = TestPool::start(|_| {}).await;
    let body = pool.access.get("/speed?bytes=3000001").await.bytes().await.unwrap();
    assert_eq!(body.len(), 3_000_001);
    assert_ne!(body[..65_536], body[65_536..131_072], "nothing to compress");
    let url = format!("{}/speed", pool.access.base);
    let answer = pool.access.client.post(url).body(body).send().await.unwrap();
    let answer: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(answer["bytes"], 3_000_001);
    assert_eq!(refusal(pool.access.get("/speed?bytes=200000001").await).await.0, 400);
    assert_eq!(refusal(pool.access.get("/speed?bytes=-1").await).await.0, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_speed_test_that_is_not_read_is_cut_and_gives_its_slot_back() {
    let pool = TestPool::start(|config| {
        config.limits.speed_tests = 1;
        // Longer than a second request takes on a busy machine.
        config.timing.speed_test = std::time::Duration::from_secs(6);
    })
    .await;
    let stalled = pool.access.get("/speed?bytes=200000000").await;
    assert_eq!(stalled.status(), 200);
    let (status, error) = refusal(pool.access.get("/speed?bytes=1").await).await;
    assert_eq!(status, 503, "{error}");
    crate::support::eventually(|| async { pool.access.get("/speed?bytes=1").await.status() == 200 }).await;
    assert!(stalled.bytes().await.is_err(), "its connection was cut");
}

#[test]
fn every_limit_of_a_source_can_be_set() {
    let output = Command::new(env!("CARGO_BIN_EXE_dvpn-pool"))
        .args(["serve", "--help"])
        .env_clear()
        .output()
        .unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for name in [
        "connections",
        "failures",
        "approvals",
        "changes",
        "nodes",
        "checkouts",
        "checks",
        "speed-tests",
    ] {
        assert!(help.contains(&format!("--limit-{name}")), "{name} in {help}");
    }
}
