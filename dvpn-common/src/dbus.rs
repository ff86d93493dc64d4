//! Names on the D-Bus system bus. The daemon serves them; the clients, the policy file and the tests read them here.

/// Well-known name and interface.
pub const NAME: &str = "org.dvpn.Daemon1";
/// The one object.
pub const PATH: &str = "/org/dvpn/Daemon1";
