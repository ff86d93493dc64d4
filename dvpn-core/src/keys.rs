//! Key derivation on Curve25519.

use aws_lc_rs::agreement::{self, X25519};
use dvpn_common::keys::{Error, PrivateKey, PublicKey};

/// The public key that belongs to a WireGuard private key (RFC 7748).
pub fn public_key(private: &PrivateKey) -> Result<PublicKey, Error> {
    let key = agreement::PrivateKey::from_private_key(&X25519, private.expose())
        .ok()
        .ok_or(Error::NotBase64)?;
    let public = key.compute_public_key().ok().ok_or(Error::NotBase64)?;
    PublicKey::from_bytes(public.as_ref().try_into().ok().ok_or(Error::NotBase64)?)
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};

    use super::*;

    #[test]
    fn public_keys_match_rfc_7748() {
        // Section 6.1, Alice.
        let private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45, 0xdf, 0x4c,
            0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = [
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a, 0x0d, 0xbf,
            0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
        ];
        assert_eq!(
            public_key(&PrivateKey::from_bytes(private)).unwrap().as_bytes(),
            &public
        );
        // The same through base64, as `wg genkey | wg pubkey` would.
        let parsed = PrivateKey::parse(&STANDARD.encode(private)).unwrap();
        assert_eq!(public_key(&parsed).unwrap().to_string(), STANDARD.encode(public));
    }
}
