//! From texts to [`Config`].

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use dvpn_common::{
    ids::{ProviderId, Region},
    keys::PrivateKey,
};
use ipnetwork::IpNetwork;
use url::Url;

use super::values::{endpoint, http_url, https_url, megabits, port};
use super::{
    BandwidthConfig, Config, ControlConfig, Error, Errors, FallbackConfig, Kind, Mode, NodeConfig, PortalConfig,
    SETTINGS, Secret, Setting, Socks5Config, Source, TunnelSettings, find,
};
use crate::{address::is_unicast, node::Rules, session::Choice, text::excerpt};

/// Where a relative `FALLBACK_SCRIPT_PATH` begins: what is executed must not depend on a working directory.
const SCRIPT_ROOT: &str = "/usr/lib/dvpn";

/// Reads the configuration from `sources`, strongest first.
pub fn parse(sources: &[Source]) -> Result<Config, Errors> {
    let mut reader = Reader {
        sources,
        errors: Vec::new(),
    };
    let config = reader.config();
    if reader.errors.is_empty() {
        Ok(config)
    } else {
        Err(Errors(reader.errors))
    }
}

/// The files that secrets are to be read from (`NAME_FILE`): setting, path, and where that was said; strongest first
/// for each setting.
pub fn secret_files(sources: &[Source]) -> Vec<(&'static Setting, PathBuf, String)> {
    let mut files = Vec::new();
    for setting in SETTINGS {
        let Some(name) = setting.file_name() else { continue };
        for source in sources {
            if let Some(path) = source.values.get(&name).filter(|path| !path.expose().is_empty()) {
                files.push((setting, PathBuf::from(path.expose()), source.origin.clone()));
            }
        }
    }
    files
}

struct Reader<'a> {
    sources: &'a [Source],
    errors: Vec<Error>,
}

/// A value, and where it came from.
struct Given<'a> {
    setting: &'static Setting,
    origin: &'a str,
    text: &'a str,
}

impl<'a> Reader<'a> {
    fn config(&mut self) -> Config {
        let node = self.node();
        Config {
            pool_url: self.url("POOL_URL"),
            pool_private: self.flag("POOL_PRIVATE"),
            pool_public_key: self.parsed("POOL_PUBLIC_KEY"),
            payment_api_url: self.url("PAYMENT_API_URL"),
            payment_token: self.secret("PAYMENT_TOKEN"),
            user_id: self.parsed("USER_ID"),
            development: self.flag("DVPN_DEVELOPMENT"),
            ssl_cert_file: self.path("SSL_CERT_FILE"),
            mesh_sample_size: usize::try_from(self.count("MESH_SAMPLE_SIZE")).unwrap_or(1).max(1),
            choice: self.choice(),
            fallback: self.fallback(),
            tunnel: self.tunnel(),
            portal: PortalConfig {
                url: self.read("CAPTIVE_PORTAL_URL", http_url),
                open_for: Duration::from_secs(self.count("CAPTIVE_PORTAL_SECONDS")),
            },
            socks5: self.socks5(),
            control: self.control(),
            node,
            bandwidth: BandwidthConfig {
                test_url: self.url("BANDWIDTH_TEST_URL"),
                sample: Duration::from_secs(self.count("BANDWIDTH_SAMPLE_SECONDS")),
                total_bits_per_second: self.read("BANDWIDTH_TOTAL_MBPS", megabits).filter(|rate| *rate > 0),
            },
            auto_network_config: self.flag("AUTO_NETWORK_CONFIG"),
            upnp: self.flag("UPNP_ENABLED"),
            tray: self.flag("ENABLE_TRAY"),
            token_passphrase: self.secret("TOKEN_PASSPHRASE"),
            // systemd separates several state directories by colons; the first is ours.
            state_directory: self
                .text("STATE_DIRECTORY")
                .and_then(|text| text.split(':').next().map(PathBuf::from))
                .unwrap_or_default(),
            bpf_directory: self.path("BPF_DIRECTORY").unwrap_or_default(),
            log: self.text("DVPN_LOG").unwrap_or_default(),
        }
    }

    fn mode(&mut self) -> Mode {
        self.read("TUNNEL_MODE", |text| match text {
            "app" => Ok(Mode::App),
            "device" => Ok(Mode::Device),
            _ => Err("must be app or device".to_owned()),
        })
        .unwrap_or_default()
    }

    fn choice(&mut self) -> Choice {
        let mut choice = Choice::default();
        let mut both = |name, ids: &mut Vec<ProviderId>, regions: &mut Vec<Region>| {
            let items = self.list(name, |item| match item.strip_prefix("region:") {
                Some(region) => region.parse::<Region>().map(Err).map_err(|error| error.to_string()),
                None => item.parse::<ProviderId>().map(Ok).map_err(|error| error.to_string()),
            });
            for item in items {
                match item {
                    Ok(id) => ids.push(id),
                    Err(region) => regions.push(region),
                }
            }
        };
        both("PROVIDERS_ONLY", &mut choice.only_ids, &mut choice.only_regions);
        both(
            "PROVIDERS_EXCLUDE",
            &mut choice.exclude_ids,
            &mut choice.exclude_regions,
        );
        choice
    }

    fn fallback(&mut self) -> FallbackConfig {
        let fallback = FallbackConfig {
            enabled: self.flag("FALLBACK_ENABLED"),
            script: Path::new(SCRIPT_ROOT).join(self.path("FALLBACK_SCRIPT_PATH").unwrap_or_default()),
            orchestrator_url: self.url("FALLBACK_ORCHESTRATOR_URL"),
            timeout: Duration::from_secs(self.count("FALLBACK_TIMEOUT_SECONDS")),
            ca_cert: self.path("FALLBACK_CA_CERT"),
        };
        if fallback.enabled && self.get("FALLBACK_ORCHESTRATOR_URL").is_none() {
            self.together(
                "FALLBACK_ORCHESTRATOR_URL",
                "FALLBACK_ENABLED=true needs an orchestrator to ask",
            );
        }
        fallback
    }

    /// A switch of device mode, and what it is there when nothing is set. Elsewhere it would promise what nobody keeps.
    fn blocking(&mut self, name: &'static str, mode: Mode, default: bool) -> bool {
        let set = self.get(name).is_some();
        let wanted = self.flag(name);
        match mode {
            Mode::Device if set => wanted,
            Mode::Device => default,
            Mode::App => {
                if wanted {
                    self.together(
                        name,
                        "app mode blocks nothing: set TUNNEL_MODE=device, or leave this false",
                    );
                }
                false
            }
        }
    }

    fn tunnel(&mut self) -> TunnelSettings {
        let addresses = self.list("WG_ADDRESS", |text| {
            text.parse::<IpNetwork>()
                .ok()
                .filter(|network| is_unicast(network.ip()))
                .ok_or_else(|| "must be addresses like 10.8.0.2/32 or fd00::2/128".to_owned())
        });
        let v4 = addresses.iter().filter(|address| address.is_ipv4()).count();
        if v4 > 1 || addresses.len() - v4 > 1 {
            self.together("WG_ADDRESS", "give at most one IPv4 and one IPv6 address");
        }
        let ports = self.list("ALLOW_INBOUND", port);
        let mode = self.mode();
        let kill_switch = self.blocking("KILL_SWITCH", mode, true);
        let lockdown = self.blocking("LOCKDOWN", mode, false);
        if lockdown && !kill_switch {
            self.together(
                "LOCKDOWN",
                "goes on blocking after Stop what KILL_SWITCH blocks: leave that true",
            );
        }
        TunnelSettings {
            private_key: self.read("WG_PRIVATE_KEY", |text| {
                PrivateKey::parse(text).map_err(|error| error.to_string())
            }),
            addresses,
            dns: self.list("TUNNEL_DNS", |text| {
                text.parse::<IpAddr>()
                    .ok()
                    .filter(|address| is_unicast(*address))
                    .ok_or_else(|| "must be IP addresses of resolvers".to_owned())
            }),
            mode,
            kill_switch,
            lockdown,
            allow_lan: self.flag("ALLOW_LAN"),
            allow_inbound: if ports.is_empty() { None } else { Some(ports) },
        }
    }

    fn socks5(&mut self) -> Socks5Config {
        let listen = self.listen("SOCKS5_LISTEN");
        let login = match (self.text("SOCKS5_USER"), self.secret("SOCKS5_PASSWORD")) {
            (Some(user), Some(password)) => {
                // RFC 1929 has one byte for each length.
                if user.len() > 255 || password.expose().len() > 255 {
                    self.together(
                        "SOCKS5_USER",
                        "name and password may have at most 255 bytes each (RFC 1929)",
                    );
                }
                Some((user, password))
            }
            (None, None) => {
                if !listen.ip().is_loopback() {
                    self.together(
                        "SOCKS5_LISTEN",
                        "off loopback the proxy needs SOCKS5_USER and SOCKS5_PASSWORD",
                    );
                }
                None
            }
            (Some(_), None) => {
                self.together(
                    "SOCKS5_PASSWORD",
                    "SOCKS5_USER is set: set the password too (SOCKS5_PASSWORD_FILE)",
                );
                None
            }
            (None, Some(_)) => {
                self.together("SOCKS5_USER", "SOCKS5_PASSWORD is set: set the name too");
                None
            }
        };
        Socks5Config { listen, login }
    }

    fn control(&mut self) -> ControlConfig {
        let listen = self.listen("CONTROL_LISTEN");
        let token = self.secret("CONTROL_TOKEN");
        if token.is_none() && !listen.ip().is_loopback() {
            self.together("CONTROL_LISTEN", "off loopback /health and /metrics need CONTROL_TOKEN");
        }
        ControlConfig { listen, token }
    }

    fn node(&mut self) -> NodeConfig {
        let port = self.read("NODE_PORT", port).unwrap_or(51820);
        let probe_port = match self.read("NODE_PROBE_PORT", self::port) {
            Some(probe_port) => probe_port,
            None => port.checked_add(1).unwrap_or(port),
        };
        if probe_port == port {
            self.together("NODE_PROBE_PORT", "must be another port than NODE_PORT");
        }
        NodeConfig {
            register: self.flag("NODE_REGISTER_ENABLED"),
            id: self.parsed("NODE_ID"),
            region: self.parsed("NODE_REGION"),
            port,
            probe_port,
            public_endpoint: self.read("NODE_PUBLIC_ENDPOINT", |text| endpoint(text, port)),
            public_probe: self.read("NODE_PUBLIC_PROBE", |text| endpoint(text, probe_port)),
            accept_terms: self.flag("NODE_ACCEPT_TERMS"),
            max_peers: u32::try_from(self.count("NODE_MAX_PEERS")).unwrap_or(1),
            rules: Rules {
                monthly_cap_bytes: self.count("NODE_MONTHLY_CAP_GB").saturating_mul(1_000_000_000),
                schedule: self.parsed("NODE_SCHEDULE").unwrap_or_default(),
                ..Rules::default()
            },
            limit_bits_per_second: self.read("NODE_LIMIT_MBPS", megabits).filter(|rate| *rate > 0),
        }
    }

    fn get(&self, name: &str) -> Option<Given<'a>> {
        let setting = find(name)?;
        self.sources
            .iter()
            .find_map(|source| {
                let text = source.values.get(name)?.expose();
                (!text.trim().is_empty()).then_some(Given {
                    setting,
                    origin: &source.origin,
                    text,
                })
            })
            .or_else(|| {
                (!setting.default.is_empty()).then_some(Given {
                    setting,
                    origin: "default",
                    text: setting.default,
                })
            })
    }

    fn read<T>(&mut self, name: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let given = self.get(name)?;
        match read(given.text.trim()) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.refuse(&given, reason);
                None
            }
        }
    }

    fn refuse(&mut self, given: &Given<'_>, reason: String) {
        // A URL with an @ may hold a password.
        let hide = given.setting.secret || (given.setting.kind == Kind::HttpsUrl && given.text.contains('@'));
        self.errors.push(Error::Value {
            name: given.setting.name,
            origin: given.origin.to_owned(),
            value: if hide { None } else { Some(excerpt(given.text)) },
            reason,
        });
    }

    fn together(&mut self, name: &'static str, reason: &'static str) {
        self.errors.push(Error::Together { name, reason });
    }

    fn text(&mut self, name: &str) -> Option<String> {
        self.read(name, |text| Ok(text.to_owned()))
    }

    fn secret(&mut self, name: &str) -> Option<Secret> {
        // Not trimmed: a passphrase may begin with a space.
        self.get(name).map(|given| Secret::new(given.text))
    }

    fn path(&mut self, name: &str) -> Option<PathBuf> {
        self.read(name, |text| Ok(PathBuf::from(text)))
    }

    fn parsed<T: FromStr<Err: ToString>>(&mut self, name: &str) -> Option<T> {
        self.read(name, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }

    fn flag(&mut self, name: &str) -> bool {
        self.read(name, |text| match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err("must be true or false".to_owned()),
        })
        .unwrap_or(false)
    }

    fn count(&mut self, name: &str) -> u64 {
        let (min, max) = match find(name).map(|setting| setting.kind) {
            Some(Kind::Count { min, max }) => (min, max),
            Some(_) | None => (0, u64::MAX),
        };
        self.read(name, |text| {
            text.parse()
                .ok()
                .filter(|number| (min..=max).contains(number))
                .ok_or_else(|| format!("must be a whole number from {min} to {max}"))
        })
        .unwrap_or(min)
    }

    fn listen(&mut self, name: &str) -> SocketAddr {
        self.read(name, |text| {
            text.parse()
                .ok()
                .ok_or_else(|| "must be IP:port, like 127.0.0.1:1080".to_owned())
        })
        .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn url(&mut self, name: &str) -> Option<Url> {
        self.read(name, https_url)
    }

    fn list<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        self.read(name, |text| {
            text.split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| read(item).map_err(|reason| format!("{}: {reason}", excerpt(item))))
                .collect()
        })
        .unwrap_or_default()
    }
}
