//! The one table of settings. Help, README, `dvpn.toml` and `.env.example` are made from it, and [`super::parse`] reads
//! nothing that is not in it.

/// What a value must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `true` or `false` (also `1`/`0`, `yes`/`no`, `on`/`off`).
    Flag,
    /// A whole number.
    Count {
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// A decimal number of megabits per second, 0 for none.
    Megabits,
    /// A UDP port.
    Port,
    /// UDP or TCP ports, separated by commas.
    Ports,
    /// `https://…` without user, query and fragment.
    HttpsUrl,
    /// `http://…` without user.
    HttpUrl,
    /// A path.
    Path,
    /// `IP:port`.
    Listen,
    /// `IP` or `IP:port`.
    Endpoint,
    /// IP addresses, separated by commas.
    Addresses,
    /// IP addresses with or without prefix length, separated by commas; one of each family.
    Prefixes,
    /// 1 to 64 letters, digits and `. _ : -`.
    Id,
    /// Provider ids and `region:NAME`, separated by commas.
    Providers,
    /// 44 characters of base64.
    Key,
    /// Hours of the day in UTC, separated by commas.
    Schedule,
    /// `app` or `device`.
    Mode,
}

impl Kind {
    /// The placeholder in help and tables.
    pub fn placeholder(self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Flag => "true|false",
            Self::Count { .. } => "NUMBER",
            Self::Megabits => "MBIT/S",
            Self::Port => "PORT",
            Self::Ports => "PORT,…",
            Self::HttpsUrl => "HTTPS-URL",
            Self::HttpUrl => "HTTP-URL",
            Self::Path => "PATH",
            Self::Listen => "IP:PORT",
            Self::Endpoint => "IP[:PORT]",
            Self::Addresses => "IP,…",
            Self::Prefixes => "IP/LEN,…",
            Self::Id => "ID",
            Self::Providers => "ID|region:NAME,…",
            Self::Key => "BASE64",
            Self::Schedule => "HH:MM-HH:MM,…",
            Self::Mode => "app|device",
        }
    }
}

/// Where a setting's name comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The product's documented contract: name and default are not ours to change.
    Contract,
    /// Added by this implementation.
    Addition,
}

/// One setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// The environment variable. In TOML the same in lower case, on the command line in kebab case.
    pub name: &'static str,
    /// What a value must look like.
    pub kind: Kind,
    /// The value when none is given; empty means none.
    pub default: &'static str,
    /// Whose name it is.
    pub owner: Owner,
    /// Never printed, never on the command line, never in `dvpn.toml`; `NAME_FILE` and systemd credentials work.
    pub secret: bool,
    /// One line for people.
    pub doc: &'static str,
}

impl Setting {
    /// The key in TOML files.
    pub fn toml_key(&self) -> String {
        self.name.to_ascii_lowercase()
    }
    /// The option on the command line, without its dashes.
    pub fn option(&self) -> String {
        self.toml_key().replace('_', "-")
    }
    /// The variable that names a file holding this secret.
    pub fn file_name(&self) -> Option<String> {
        self.secret.then(|| format!("{}_FILE", self.name))
    }
}

/// The setting of this environment name.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

const fn contract(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Setting {
    Setting {
        name,
        kind,
        default,
        owner: Owner::Contract,
        secret: false,
        doc,
    }
}

const fn addition(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Setting {
    Setting {
        name,
        kind,
        default,
        owner: Owner::Addition,
        secret: false,
        doc,
    }
}

const fn secret(setting: Setting) -> Setting {
    Setting {
        secret: true,
        ..setting
    }
}

/// Every setting, in the order people read them.
pub static SETTINGS: &[Setting] = &[
    contract(
        "POOL_URL",
        Kind::HttpsUrl,
        "",
        "The pool's provider list; ends in /providers.",
    ),
    contract(
        "PAYMENT_API_URL",
        Kind::HttpsUrl,
        "",
        "The payment server: verify, and checkout below it.",
    ),
    secret(contract(
        "PAYMENT_TOKEN",
        Kind::Text,
        "",
        "The token of a paid month; usually stored by Payments instead.",
    )),
    contract(
        "MESH_SAMPLE_SIZE",
        Kind::Count { min: 1, max: 100 },
        "3",
        "How many randomly drawn providers are measured at each connect.",
    ),
    contract(
        "FALLBACK_ENABLED",
        Kind::Flag,
        "false",
        "Have the orchestrator make a provider when the pool fails.",
    ),
    contract(
        "FALLBACK_SCRIPT_PATH",
        Kind::Path,
        "scripts/setup_fallback_node.sh",
        "The only program the daemon ever runs; it and its directories must belong to root. Relative: below /usr/lib/dvpn.",
    ),
    contract(
        "FALLBACK_ORCHESTRATOR_URL",
        Kind::HttpsUrl,
        "",
        "Where the fallback script asks for a provider.",
    ),
    contract(
        "FALLBACK_TIMEOUT_SECONDS",
        Kind::Count { min: 1, max: 3600 },
        "120",
        "The fallback script is killed after this long.",
    ),
    contract(
        "FALLBACK_CA_CERT",
        Kind::Path,
        "",
        "PEM roots that replace the system's (and SSL_CERT_FILE) for the orchestrator.",
    ),
    contract(
        "SSL_CERT_FILE",
        Kind::Path,
        "",
        "PEM roots that replace the system's for pool and payment.",
    ),
    contract(
        "AUTO_NETWORK_CONFIG",
        Kind::Flag,
        "true",
        "Find out this machine's own and public addresses.",
    ),
    contract(
        "UPNP_ENABLED",
        Kind::Flag,
        "true",
        "Ask the router for a UDP port mapping when being a provider.",
    ),
    contract(
        "NODE_REGISTER_ENABLED",
        Kind::Flag,
        "false",
        "Be a provider: register with the pool and serve peers.",
    ),
    contract(
        "NODE_ID",
        Kind::Id,
        "",
        "This provider's id at the pool; made once at random when empty.",
    ),
    contract(
        "NODE_PORT",
        Kind::Port,
        "51820",
        "UDP port of the provider's WireGuard socket.",
    ),
    contract(
        "NODE_PUBLIC_ENDPOINT",
        Kind::Endpoint,
        "",
        "Where clients reach this provider; found out when empty.",
    ),
    contract(
        "BANDWIDTH_TEST_URL",
        Kind::HttpsUrl,
        "",
        "Where the line is measured: GET ?bytes=N and POST, as the pool's /speed; a plain file tells the download alone.",
    ),
    contract(
        "BANDWIDTH_SAMPLE_SECONDS",
        Kind::Count { min: 1, max: 60 },
        "8",
        "How long each direction of the line is measured.",
    ),
    contract(
        "BANDWIDTH_TOTAL_MBPS",
        Kind::Megabits,
        "0",
        "What the line carries, each way, IP headers counted; 0 measures it.",
    ),
    contract(
        "ENABLE_TRAY",
        Kind::Flag,
        "false",
        "Show the tray icon in desktop sessions.",
    ),
    contract(
        "USER_ID",
        Kind::Id,
        "",
        "Who pays, at checkout; made once at random when empty.",
    ),
    secret(addition(
        "WG_PRIVATE_KEY",
        Kind::Key,
        "",
        "A fixed client key; a fresh one is made for each provider when empty.",
    )),
    addition(
        "WG_ADDRESS",
        Kind::Prefixes,
        "",
        "Our tunnel addresses at a pool that assigns none.",
    ),
    secret(addition(
        "TOKEN_PASSPHRASE",
        Kind::Text,
        "",
        "Seals the stored token; a random key file is made when empty.",
    )),
    addition(
        "POOL_PUBLIC_KEY",
        Kind::Key,
        "",
        "The pool's Ed25519 key; with it, unsigned approvals are refused.",
    ),
    addition(
        "POOL_PRIVATE",
        Kind::Flag,
        "false",
        "The pool may list private and loopback addresses.",
    ),
    addition(
        "PROVIDERS_ONLY",
        Kind::Providers,
        "",
        "Use only these providers and regions.",
    ),
    addition(
        "PROVIDERS_EXCLUDE",
        Kind::Providers,
        "",
        "Never use these providers and regions.",
    ),
    addition(
        "TUNNEL_MODE",
        Kind::Mode,
        "app",
        "app: what uses the proxy goes through the tunnel. device: everything does.",
    ),
    addition(
        "KILL_SWITCH",
        Kind::Flag,
        "",
        "Block traffic outside the tunnel while a session is wanted; device mode only, where it is on unless set to false.",
    ),
    addition(
        "LOCKDOWN",
        Kind::Flag,
        "false",
        "Keep blocking even after Stop; device mode only.",
    ),
    addition(
        "ALLOW_LAN",
        Kind::Flag,
        "false",
        "In device mode: the local network stays reachable, except for its name servers.",
    ),
    addition(
        "ALLOW_INBOUND",
        Kind::Ports,
        "",
        "In device mode: TCP ports that stay reachable from outside; 22 when empty and something listens there.",
    ),
    addition(
        "CAPTIVE_PORTAL_URL",
        Kind::HttpUrl,
        "",
        "Asked in the clear while blocked and without the pool: an answer other than 204, 4xx or 5xx is a login page. Empty: the pool's host at port 80.",
    ),
    addition(
        "CAPTIVE_PORTAL_SECONDS",
        Kind::Count { min: 1, max: 900 },
        "300",
        "Longest time that Portal lets a user's browser out to log in to the network.",
    ),
    addition(
        "TUNNEL_DNS",
        Kind::Addresses,
        "",
        "Resolvers inside the tunnel; the provider's own when empty.",
    ),
    addition(
        "SOCKS5_LISTEN",
        Kind::Listen,
        "127.0.0.1:1080",
        "Where the proxy listens; off loopback only with a login.",
    ),
    addition("SOCKS5_USER", Kind::Text, "", "Name for the proxy."),
    secret(addition("SOCKS5_PASSWORD", Kind::Text, "", "Password for the proxy.")),
    addition(
        "CONTROL_LISTEN",
        Kind::Listen,
        "127.0.0.1:9808",
        "Where /health and /metrics answer; off loopback only with CONTROL_TOKEN.",
    ),
    secret(addition(
        "CONTROL_TOKEN",
        Kind::Text,
        "",
        "Bearer token for /health and /metrics.",
    )),
    addition(
        "NODE_REGION",
        Kind::Id,
        "",
        "Where this provider stands, as the pool names it.",
    ),
    addition(
        "NODE_PROBE_PORT",
        Kind::Port,
        "",
        "UDP port of the latency echo; NODE_PORT + 1 when empty.",
    ),
    addition(
        "NODE_PUBLIC_PROBE",
        Kind::Endpoint,
        "",
        "Where clients reach the latency echo; found out when empty.",
    ),
    addition(
        "NODE_ACCEPT_TERMS",
        Kind::Flag,
        "false",
        "A provider's owner knows: others' traffic leaves by this address, and no payouts exist in this release.",
    ),
    addition(
        "NODE_MAX_PEERS",
        Kind::Count { min: 1, max: 4096 },
        "250",
        "Most clients this provider admits.",
    ),
    addition(
        "NODE_MONTHLY_CAP_GB",
        Kind::Count { min: 0, max: 1_000_000 },
        "0",
        "Clients' traffic a calendar month (UTC), both directions, in 10^9 bytes; then nobody is served. 0: no end.",
    ),
    addition(
        "NODE_SCHEDULE",
        Kind::Schedule,
        "",
        "When clients are served, in UTC, like 22:00-06:00; always when empty.",
    ),
    addition(
        "NODE_LIMIT_MBPS",
        Kind::Megabits,
        "0",
        "Most of the line for all clients together, 0 for all of it; shown, and not enforced in this version.",
    ),
    addition(
        "STATE_DIRECTORY",
        Kind::Path,
        "/var/lib/dvpn",
        "What survives a restart; systemd sets it.",
    ),
    addition(
        "BPF_DIRECTORY",
        Kind::Path,
        "/sys/fs/bpf/dvpn",
        "Where the kernel programs are pinned.",
    ),
    addition(
        "DVPN_DEVELOPMENT",
        Kind::Flag,
        "false",
        "Accept development tokens (dev_…), which nobody paid for.",
    ),
    addition(
        "DVPN_LOG",
        Kind::Text,
        "info",
        "Log filter: error, warn, info, debug, trace, or module=level,…",
    ),
];
