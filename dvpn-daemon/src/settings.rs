//! Settings: the command line, the environment, credentials and files become one `dvpn_core::config::Config`.
