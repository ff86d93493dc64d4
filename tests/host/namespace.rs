//! Network namespaces that live as long as a test.

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
pub(crate) struct Namespace(File);

impl Namespace {
    /// Moves the calling thread (a test's only one, before any runtime) into a fresh namespace, loopback up.
    pub(crate) fn enter_new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let here = Self(File::open("/proc/thread-self/ns/net").unwrap());
        here.sh("ip link set lo up");
        here
    }

    /// A further namespace, loopback up.
    pub(crate) fn new() -> Self {
        let there = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        });
        let there = there.join().unwrap();
        there.sh("ip link set lo up");
        there
    }

    /// Runs something inside, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a shell script inside; it must succeed. Returns what it printed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.run(|| Command::new("sh").args(["-euc", script]).output().unwrap());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{script}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A path that `ip link set … netns` understands.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Everything that the host module may change, as the kernel's own tools see it.
    pub(crate) fn snapshot(&self) -> String {
        // What the kernel does by itself (link state, link-local addresses) is no setting.
        self.sh(
            "ip -o link | sed 's/<.*> / /; s/ qdisc.*//'; ip -o addr | grep -v 'scope link' | sed 's/valid_lft.*//'; \
             ip rule; ip -6 rule; ip route show table all | grep -v -e fe80 -e ff00 | sort; nft list ruleset; \
             for f in /proc/sys/net/ipv[46]/conf/*/*forwarding /proc/sys/net/ipv6/conf/*/accept_ra; do \
             echo $f $(cat $f); done",
        )
    }
}
