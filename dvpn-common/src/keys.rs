//! WireGuard and Ed25519 keys: 32 bytes, base64 in text.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Why a text is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not base64 of exactly 32 bytes.
    #[error("a key is 44 characters of base64 (32 bytes)")]
    NotBase64,
    /// All zero: the point every key agreement with which gives zero.
    #[error("the all-zero key is not a key")]
    Zero,
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, Error> {
    let mut bytes = Zeroizing::new([0_u8; 32]);
    // decode_slice wants room for its estimate (33 bytes for 44 characters).
    let mut room = Zeroizing::new([0_u8; 33]);
    if text.len() != 44 {
        return Err(Error::NotBase64);
    }
    match STANDARD.decode_slice(text, room.as_mut_slice()) {
        Ok(32) => {}
        Ok(_) | Err(_) => return Err(Error::NotBase64),
    }
    bytes.copy_from_slice(room.get(..32).unwrap_or_default());
    if bytes.iter().all(|b| *b == 0) {
        Err(Error::Zero)
    } else {
        Ok(bytes)
    }
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 32]);

        impl $name {
            /// Takes 32 bytes; all zero is refused.
            pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, Error> {
                if bytes.iter().all(|b| *b == 0) { Err(Error::Zero) } else { Ok(Self(bytes)) }
            }
            /// The 32 bytes.
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                decode(text).map(|bytes| Self(*bytes))
            }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(key: $name) -> Self {
                STANDARD.encode(key.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&STANDARD.encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

public_key!(
    /// A Curve25519 public key, as wg(8) writes it.
    PublicKey
);
public_key!(
    /// An Ed25519 verifying key (RFC 8032): of a node, or of the pool.
    VerifyingKey
);

/// A Curve25519 private key. It has no Display and no Debug; it is wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

impl PrivateKey {
    /// Takes 32 random bytes and clamps them (RFC 7748, section 5).
    pub fn from_bytes(mut bytes: [u8; 32]) -> Self {
        let [first, .., last] = &mut bytes;
        *first &= 0xf8;
        *last = (*last & 0x7f) | 0x40;
        let key = Self(bytes);
        bytes.zeroize();
        key
    }
    /// Reads base64 as `wg genkey` writes it.
    pub fn parse(text: &str) -> Result<Self, Error> {
        decode(text.trim()).map(|bytes| Self::from_bytes(*bytes))
    }
    /// The 32 secret bytes: for the WireGuard device and key agreement only.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_bytes_of_base64_and_not_zero() {
        let text = STANDARD.encode([7_u8; 32]);
        assert_eq!(text.parse::<PublicKey>().unwrap().to_string(), text);
        assert_eq!(STANDARD.encode([0_u8; 32]).parse::<PublicKey>(), Err(Error::Zero));
        for bad in [
            "",
            "abc",
            &STANDARD.encode([7_u8; 31]),
            &STANDARD.encode([7_u8; 33]),
            &format!("{text}="),
        ] {
            assert_eq!(bad.parse::<PublicKey>(), Err(Error::NotBase64), "{bad}");
        }
    }

    #[test]
    fn private_keys_are_clamped() {
        let key = PrivateKey::from_bytes([0xff; 32]);
        assert_eq!(key.expose()[0], 0xf8);
        assert_eq!(key.expose()[31], 0x7f);
    }
}
