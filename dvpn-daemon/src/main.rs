//! The DVPN system service.

fn main() {}
