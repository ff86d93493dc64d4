//! Names on the D-Bus system bus. The daemon serves them; the clients, the policy file and the tests read them here.

/// Well-known name and interface.
pub const NAME: &str = "org.dvpn.Daemon1";
/// The one object.
pub const PATH: &str = "/org/dvpn/Daemon1";

/// What the method `Portal` answers (`a{sv}`).
pub mod portal {
    /// The SOCKS5 proxy for the browser: text, `socks5://ADDRESS:PORT`.
    pub const PROXY: &str = "proxy";
    /// What to open in it: text, a URL.
    pub const PAGE: &str = "page";
    /// When it ends at the latest: signed, Unix seconds.
    pub const ENDS_AT: &str = "ends_at";
}
