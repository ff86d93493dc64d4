//! Kernel settings that a provider needs, remembered before they are changed and put back afterwards.
//!
//! IPv4 forwarding is decided per *incoming* interface, so only the tunnel's and the uplink's are switched on. IPv6 has
//! that since Linux 6.17 (`force_forwarding`); before, only `conf/all/forwarding` counts (`ip6_forward`), which also
//! makes interfaces deaf to router advertisements unless `accept_ra` is 2.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Error, provider_policy::Router};

const ROOT: &str = "/proc/sys/net";
const IPV6_EVERYWHERE: &str = "ipv6/conf/all/forwarding";

/// One setting and the value it had, in the form in which it is remembered: `ipv4/conf/eth0/forwarding=0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remembered {
    /// Below [`ROOT`].
    path: String,
    /// Before we changed it.
    before: String,
    /// What we set.
    set: String,
}

impl Remembered {
    pub(super) fn to_comment(&self) -> String {
        format!("{}={}>{}", self.path, self.before, self.set)
    }

    /// Reads [`Remembered::to_comment`]; nothing if it is another comment or leads outside the settings we change.
    pub(super) fn parse(comment: &str) -> Option<Self> {
        let (path, values) = comment.split_once('=')?;
        let (before, set) = values.split_once('>')?;
        let (family, rest) = path.split_once("/conf/")?;
        let (interface, setting) = rest.split_once('/')?;
        let safe = matches!(family, "ipv4" | "ipv6")
            && matches!(
                setting,
                "forwarding" | "force_forwarding" | "accept_ra" | "src_valid_mark" | "arp_ignore"
            )
            && !interface.is_empty()
            && interface != ".."
            && interface != ".";
        let number = |text: &str| !text.is_empty() && text.len() < 4 && text.bytes().all(|b| b.is_ascii_digit());
        (safe && number(before) && number(set)).then(|| Self {
            path: path.to_owned(),
            before: before.to_owned(),
            set: set.to_owned(),
        })
    }

    fn file(&self) -> PathBuf {
        Path::new(ROOT).join(&self.path)
    }

    /// Whether both are about the same setting.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        self.path == other.path
    }

    fn is_ipv4_forwarding(&self) -> bool {
        self.path.starts_with("ipv4/") && self.path.ends_with("/forwarding")
    }

    pub(super) fn apply(&self) -> Result<(), Error> {
        write(&self.file(), &self.set)
    }

    /// Puts the old value back, unless the setting is gone, somebody else changed it since, or the whole machine was
    /// made a router meanwhile; says whether it did.
    pub(super) fn restore(&self) -> Result<bool, Error> {
        let file = self.file();
        match read(&file) {
            Ok(now) if now == self.set && !(self.is_ipv4_forwarding() && forwards_everything()) => {
                write(&file, &self.before).map(|()| true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Setting { path: file, source }),
        }
    }
}

/// For whom else this machine forwards, given what we changed ourselves.
pub(super) fn router(remembered: &[Remembered]) -> Router {
    let by_us = remembered.iter().any(|setting| setting.path == IPV6_EVERYWHERE);
    Router {
        ipv4: forwards_everything(),
        ipv6: !by_us && read(&Path::new(ROOT).join(IPV6_EVERYWHERE)).is_ok_and(|value| value != "0"),
        ipv6_everywhere_by_us: by_us,
    }
}

/// Whether somebody made this machine a router for all its interfaces. We never do for IPv4.
pub(super) fn forwards_everything() -> bool {
    read(&Path::new(ROOT).join("ipv4/conf/all/forwarding")).is_ok_and(|value| value == "1")
}

/// What has to be changed so that packets from `interface` are forwarded to `uplinks` and back.
pub(super) fn needed(interface: &str, uplinks: &[String], ipv4: bool, ipv6: bool) -> Result<Vec<Remembered>, Error> {
    let mut changes = Vec::new();
    let mut want = |path: String, set: &str| -> Result<(), Error> {
        let file = Path::new(ROOT).join(&path);
        let before = read(&file).map_err(|source| Error::Setting { path: file, source })?;
        if before != set {
            changes.push(Remembered {
                path,
                before,
                set: set.to_owned(),
            });
        }
        Ok(())
    };
    let interfaces = || std::iter::once(interface).chain(uplinks.iter().map(String::as_str));
    if ipv4 {
        for name in interfaces() {
            want(format!("ipv4/conf/{name}/forwarding"), "1")?;
        }
    }
    let routes_ipv6 = read(&Path::new(ROOT).join(IPV6_EVERYWHERE)).is_ok_and(|value| value != "0");
    if ipv6 && !routes_ipv6 {
        if Path::new(ROOT).join("ipv6/conf/all/force_forwarding").exists() {
            for name in interfaces() {
                want(format!("ipv6/conf/{name}/force_forwarding"), "1")?;
            }
        } else {
            for name in uplinks {
                let accepts = read(&Path::new(ROOT).join(format!("ipv6/conf/{name}/accept_ra")));
                if accepts.is_ok_and(|value| value == "1") {
                    want(format!("ipv6/conf/{name}/accept_ra"), "2")?;
                }
            }
            want(IPV6_EVERYWHERE.to_owned(), "1")?;
        }
    }
    Ok(changes)
}

/// What device mode needs of the machine.
///
/// Where the way back is checked strictly (`rp_filter` 1), answers to marked packets are looked up by their mark. ARP
/// answers only for addresses of the interface that is asked, so that the local network cannot find out the tunnel's;
/// the stricter `arp_ignore` 2 would make machines unreachable whose address has no subnet with the router in it.
pub(super) fn client_needs(uplinks: &[String]) -> Vec<Remembered> {
    let number = |path: &str| {
        read(&Path::new(ROOT).join(path))
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
            .unwrap_or(0)
    };
    let mut changes = Vec::new();
    let mut want = |path: String, before: u32, set: u32| {
        changes.push(Remembered {
            path,
            before: before.to_string(),
            set: set.to_string(),
        });
    };
    // The greater of the two values counts, for each of these settings (Documentation/networking/ip-sysctl.rst).
    let of_all = |setting: &str| number(&format!("ipv4/conf/all/{setting}"));
    let mut strict = false;
    for uplink in uplinks {
        let path = format!("ipv4/conf/{uplink}/arp_ignore");
        let own = number(&path);
        if own.max(of_all("arp_ignore")) == 0 {
            want(path, own, 1);
        }
        strict |= number(&format!("ipv4/conf/{uplink}/rp_filter")).max(of_all("rp_filter")) == 1;
    }
    if strict && of_all("src_valid_mark") == 0 {
        want("ipv4/conf/all/src_valid_mark".to_owned(), 0, 1);
    }
    changes
}

/// Whether somebody on this machine takes TCP connections from outside at this port.
pub(super) fn listens(port: u16) -> bool {
    const LISTEN: &str = "0A";
    ["/proc/self/net/tcp", "/proc/self/net/tcp6"].iter().any(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let (Some(local), Some(_), Some(state)) = (words.next(), words.next(), words.next()) else {
                return false;
            };
            let Some((address, at)) = local.split_once(':') else {
                return false;
            };
            // 127.0.0.0/8 in the byte order of this machine, ::1 in words of it.
            let loopback = if address.len() == 8 {
                u32::from_str_radix(address, 16).is_ok_and(|word| word.to_ne_bytes()[0] == 127)
            } else {
                address == "00000000000000000000000001000000"
            };
            state == LISTEN && !loopback && u16::from_str_radix(at, 16) == Ok(port)
        })
    })
}

fn read(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

fn write(file: &Path, value: &str) -> Result<(), Error> {
    fs::write(file, value).map_err(|source| Error::Setting {
        path: file.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remembered_setting_survives_its_comment() {
        let one = Remembered {
            path: "ipv4/conf/eth0/forwarding".into(),
            before: "0".into(),
            set: "1".into(),
        };
        assert_eq!(Remembered::parse(&one.to_comment()), Some(one));
    }

    #[test]
    fn a_planted_comment_leads_nowhere_else() {
        for bad in [
            "ipv4/conf/../forwarding=0>1",
            "ipv4/conf/eth0/../../../kernel/core_pattern=0>1",
            "ipv4/conf/eth0/rp_filter=0>1",
            "../ipv4/conf/eth0/forwarding=0>1",
            "ipv4/conf/eth0/forwarding=0",
            "ipv4/conf/eth0/forwarding=x>1",
            "hello",
        ] {
            assert_eq!(Remembered::parse(bad), None, "{bad}");
        }
    }
}
