//! The DVPN tc programs.

fn main() {}
