//! Sealed records: whole, ours, or refused.
//!
//! ```text
//! "DVPNSEAL" [8] | version [1] | how the key was made [1] | salt [16] | length of purpose [1] | purpose
//!   | key check [16] | nonce [12] | length of body [4, big-endian] | body and tag | SHA-256 of all before [32]
//! ```
//! The body is sealed with ChaCha20-Poly1305 (RFC 8439) under HMAC-SHA256(master, "aead"), everything before it being
//! authenticated with it. The master key is PBKDF2-HMAC-SHA256 (RFC 8018) of a passphrase with 600,000 rounds, or
//! HMAC-SHA256 of the salt under a random key file. The plain digest at the end and the key check tell a damaged file
//! from another passphrase and both from a forgery; only the tag makes the record believed.

use std::num::NonZeroU32;

use aws_lc_rs::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
    hmac, pbkdf2,
};
use zeroize::Zeroizing;

use crate::config::Secret;

const MAGIC: &[u8; 8] = b"DVPNSEAL";
const VERSION: u8 = 1;
/// OWASP's figure of 2023 for PBKDF2-HMAC-SHA256; version 1 of the format means exactly this many.
const ROUNDS: NonZeroU32 = NonZeroU32::MIN.saturating_add(600_000 - 1);
const TAG_BYTES: usize = 16;
const CHECK_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;
/// Largest plaintext, in bytes: what is sealed here is small, and a file that claims more is not ours.
pub const MAX_PLAINTEXT_BYTES: usize = 64 * 1024;
/// Random bytes of a salt.
pub const SALT_BYTES: usize = 16;
/// Random bytes of a nonce.
pub const NONCE_BYTES: usize = 12;

/// Why nothing was sealed or opened. None of these names a path: the caller does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not our magic.
    #[error("it is no sealed record: remove it and store the secret again")]
    NotSealed,
    /// A version after ours.
    #[error("it was written by a newer version (format {0}): upgrade DVPN, or remove it and store the secret again")]
    Newer(u8),
    /// Ends too early.
    #[error("it is truncated: restore it from a backup, or remove it and store the secret again")]
    Truncated,
    /// The digest at its end does not match, or its header makes no sense.
    #[error("it is damaged: restore it from a backup, or remove it and store the secret again")]
    Damaged,
    /// A key file opens what a passphrase sealed, or the other way round.
    #[error("it was sealed {0}: configure that again, or remove it and store the secret again")]
    OtherSealing(&'static str),
    /// A record of another kind, moved here.
    #[error("it is a record of another kind: somebody moved files; put them back")]
    OtherPurpose,
    /// Another passphrase or key file.
    #[error(
        "it was sealed with another passphrase or key file: configure that one (TOKEN_PASSPHRASE), or remove it and store the secret again"
    )]
    OtherKey,
    /// Everything fits except what only the key's holder can make.
    #[error("it was tampered with: find out who can write here, then remove it and store the secret again")]
    Tampered,
    /// More than [`MAX_PLAINTEXT_BYTES`] or a purpose of more than 255 bytes.
    #[error("it is too large to seal")]
    TooLarge,
    /// The crypto library refused; it has no reason to.
    #[error("the cryptographic library refused")]
    Crypto,
}

/// What a key is made from. No Debug.
#[derive(Clone)]
pub enum Material {
    /// `TOKEN_PASSPHRASE`.
    Passphrase(Secret),
    /// 32 random bytes of a key file.
    KeyFile(Zeroizing<[u8; 32]>),
}

impl Material {
    fn code(&self) -> u8 {
        match self {
            Self::KeyFile(_) => 0,
            Self::Passphrase(_) => 1,
        }
    }
}

/// A derived key for one salt. Deriving from a passphrase takes about 75 ms: derive once, use often. No Debug.
pub struct Key {
    code: u8,
    salt: [u8; SALT_BYTES],
    check: [u8; CHECK_BYTES],
    aead: LessSafeKey,
}

impl Key {
    /// Derives the key for `salt`.
    pub fn derive(material: &Material, salt: [u8; SALT_BYTES]) -> Result<Self, Error> {
        let mut master = Zeroizing::new([0_u8; 32]);
        match material {
            Material::Passphrase(passphrase) => pbkdf2::derive(
                pbkdf2::PBKDF2_HMAC_SHA256,
                ROUNDS,
                &salt,
                passphrase.expose().as_bytes(),
                master.as_mut_slice(),
            ),
            Material::KeyFile(key) => *master = expand(key.as_slice(), &salt),
        }
        let aead = Zeroizing::new(expand(master.as_slice(), b"aead"));
        let mut check = [0; CHECK_BYTES];
        check
            .iter_mut()
            .zip(expand(master.as_slice(), b"check"))
            .for_each(|(to, from)| *to = from);
        let aead = UnboundKey::new(&CHACHA20_POLY1305, aead.as_slice())
            .ok()
            .ok_or(Error::Crypto)?;
        Ok(Self {
            code: material.code(),
            salt,
            check,
            aead: LessSafeKey::new(aead),
        })
    }

    /// The salt this key was derived for.
    pub fn salt(&self) -> [u8; SALT_BYTES] {
        self.salt
    }

    /// Seals `plaintext`. `nonce` is fresh randomness from the operating system.
    pub fn seal(&self, purpose: &str, plaintext: &[u8], nonce: [u8; NONCE_BYTES]) -> Result<Vec<u8>, Error> {
        let purpose_length = u8::try_from(purpose.len()).ok().ok_or(Error::TooLarge)?;
        let body_length = u32::try_from(plaintext.len() + TAG_BYTES).ok().ok_or(Error::TooLarge)?;
        if plaintext.len() > MAX_PLAINTEXT_BYTES {
            return Err(Error::TooLarge);
        }
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&[VERSION, self.code]);
        out.extend_from_slice(&self.salt);
        out.push(purpose_length);
        out.extend_from_slice(purpose.as_bytes());
        out.extend_from_slice(&self.check);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&body_length.to_be_bytes());
        let mut body = Zeroizing::new(plaintext.to_vec());
        let tag = self
            .aead
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(&out),
                body.as_mut_slice(),
            )
            .ok()
            .ok_or(Error::Crypto)?;
        out.extend_from_slice(&body);
        out.extend_from_slice(tag.as_ref());
        let sum = digest(&SHA256, &out);
        out.extend_from_slice(sum.as_ref());
        Ok(out)
    }

    /// Opens a record sealed for `purpose` with this key.
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let record = Record::read(sealed)?;
        if record.code != self.code {
            return Err(Error::OtherSealing(if record.code == 0 {
                "with a key file"
            } else {
                "with a passphrase"
            }));
        }
        if record.purpose != purpose.as_bytes() {
            return Err(Error::OtherPurpose);
        }
        if record.salt != self.salt || verify_slices_are_equal(record.check, &self.check).is_err() {
            return Err(Error::OtherKey);
        }
        let mut body = Zeroizing::new(record.body.to_vec());
        let length = self
            .aead
            .open_in_place(
                Nonce::assume_unique_for_key(record.nonce),
                Aad::from(record.header),
                body.as_mut_slice(),
            )
            .ok()
            .ok_or(Error::Tampered)?
            .len();
        body.truncate(length);
        Ok(body)
    }
}

/// The salt a record was sealed with, so that its key can be derived. The record is whole but not believed yet.
pub fn salt_of(sealed: &[u8]) -> Result<[u8; SALT_BYTES], Error> {
    Record::read(sealed).map(|record| record.salt)
}

/// Seals once: derives the key and uses it. `salt` and `nonce` are fresh randomness.
pub fn seal(
    material: &Material,
    purpose: &str,
    plaintext: &[u8],
    salt: [u8; SALT_BYTES],
    nonce: [u8; NONCE_BYTES],
) -> Result<Vec<u8>, Error> {
    Key::derive(material, salt)?.seal(purpose, plaintext, nonce)
}

/// Opens once: derives the key and uses it.
pub fn open(material: &Material, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    Key::derive(material, salt_of(sealed)?)?.open(purpose, sealed)
}

fn expand(key: &[u8], label: &[u8]) -> [u8; 32] {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), label);
    let mut out = [0; 32];
    out.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
    out
}

/// A record taken apart; whole by its digest, not believed yet.
struct Record<'a> {
    code: u8,
    salt: [u8; SALT_BYTES],
    purpose: &'a [u8],
    check: &'a [u8; CHECK_BYTES],
    nonce: [u8; NONCE_BYTES],
    header: &'a [u8],
    body: &'a [u8],
}

impl<'a> Record<'a> {
    fn read(sealed: &'a [u8]) -> Result<Self, Error> {
        let rest = match sealed.strip_prefix(MAGIC) {
            Some(rest) => rest,
            // A cut inside the magic is a cut, not another format.
            None if MAGIC.starts_with(sealed) => return Err(Error::Truncated),
            None => return Err(Error::NotSealed),
        };
        let (&version, rest) = rest.split_first().ok_or(Error::Truncated)?;
        match version {
            VERSION => {}
            0 => return Err(Error::Damaged),
            newer => return Err(Error::Newer(newer)),
        }
        let (&code, rest) = rest.split_first().ok_or(Error::Truncated)?;
        let (salt, rest) = rest.split_first_chunk::<SALT_BYTES>().ok_or(Error::Truncated)?;
        let (&purpose_length, rest) = rest.split_first().ok_or(Error::Truncated)?;
        let (purpose, rest) = rest
            .split_at_checked(usize::from(purpose_length))
            .ok_or(Error::Truncated)?;
        let (check, rest) = rest.split_first_chunk::<CHECK_BYTES>().ok_or(Error::Truncated)?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(Error::Truncated)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(Error::Truncated)?;
        let length = usize::try_from(u32::from_be_bytes(*length))
            .ok()
            .ok_or(Error::Damaged)?;
        if !(TAG_BYTES..=MAX_PLAINTEXT_BYTES + TAG_BYTES).contains(&length) || code > 1 {
            return Err(Error::Damaged);
        }
        let header = sealed.get(..sealed.len() - rest.len()).ok_or(Error::Truncated)?;
        let (body, sum) = rest.split_at_checked(length).ok_or(Error::Truncated)?;
        if sum.len() < DIGEST_BYTES {
            return Err(Error::Truncated);
        }
        let covered = sealed.get(..header.len() + body.len()).ok_or(Error::Truncated)?;
        if digest(&SHA256, covered).as_ref() != sum {
            return Err(Error::Damaged);
        }
        Ok(Self {
            code,
            salt: *salt,
            purpose,
            check,
            nonce: *nonce,
            header,
            body,
        })
    }
}

#[cfg(test)]
mod tests;
