//! The DVPN pool server.

fn main() {}
