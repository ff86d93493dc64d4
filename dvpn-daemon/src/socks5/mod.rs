//! The SOCKS5 proxy (RFC 1928): through the tunnel or not at all.
