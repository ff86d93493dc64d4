//! Requests that a node signs with its Ed25519 identity: registration, heartbeat, event stream, acknowledgement.
//!
//! The signature covers `dvpn-request-v1\0` and then, each with its length as a big-endian u32 before it: the method,
//! the path with its query, SHA-256 of the body, the Unix time in seconds as decimal text, a nonce, the node's id.

/// Header: the node's id.
pub const HEADER_NODE: &str = "dvpn-node";
/// Header: Unix time in seconds.
pub const HEADER_TIME: &str = "dvpn-time";
/// Header: 16 random bytes, hexadecimal; used once.
pub const HEADER_NONCE: &str = "dvpn-nonce";
/// Header: the Ed25519 signature, base64.
pub const HEADER_SIGNATURE: &str = "dvpn-signature";

/// What a node signs.
#[derive(Debug, Clone, Copy)]
pub struct SignedRequest<'a> {
    /// `GET` or `POST`.
    pub method: &'a str,
    /// Path and query as sent, beginning with `/`.
    pub path: &'a str,
    /// SHA-256 of the body; of nothing for a request without one.
    pub body_sha256: &'a [u8; 32],
    /// Unix time, seconds.
    pub time: i64,
    /// The nonce as it stands in the header.
    pub nonce: &'a str,
    /// The node's id.
    pub node: &'a str,
}

impl SignedRequest<'_> {
    /// The bytes under the signature.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"dvpn-request-v1\0".to_vec();
        let time = self.time.to_string();
        for field in [
            self.method.as_bytes(),
            self.path.as_bytes(),
            self.body_sha256,
            time.as_bytes(),
            self.nonce.as_bytes(),
            self.node.as_bytes(),
        ] {
            crate::approval::push_field(&mut out, field);
        }
        out
    }
}
