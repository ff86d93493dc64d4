//! How a direction is enforced.

use std::{collections::BTreeSet, fmt};

use dvpn_common::{abi, grant::Meter, rate::Rate};

/// How one direction is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Packets wait in fq for the time of departure that the program gave them.
    Edt,
    /// Packets wait in the peer's class of htb.
    Htb,
    /// Packets above the grant are dropped.
    Police,
}

impl Mode {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Edt => abi::mode::EDT,
            Self::Htb => abi::mode::HTB,
            Self::Police => abi::mode::POLICE,
        }
    }

    pub(super) fn meter(self, rate: Rate) -> Meter {
        match self {
            Self::Edt | Self::Htb => Meter::paced(rate),
            Self::Police => Meter::policed(rate),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Edt => "edt",
            Self::Htb => "htb",
            Self::Police => "police",
        })
    }
}

/// How both directions are enforced, and why not better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modes {
    /// Towards the peers.
    pub down: Mode,
    /// From the peers.
    pub up: Mode,
    /// What this kernel lacks for a better one.
    pub reasons: BTreeSet<String>,
}

/// `edt`, or `download htb, upload police (the kernel has no qdisc fq; …)`.
impl fmt::Display for Modes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.down == self.up {
            write!(f, "{}", self.down)?;
        } else {
            write!(f, "download {}, upload {}", self.down, self.up)?;
        }
        if self.reasons.is_empty() {
            return Ok(());
        }
        let reasons: Vec<&str> = self.reasons.iter().map(String::as_str).collect();
        write!(f, " ({})", reasons.join("; "))
    }
}
