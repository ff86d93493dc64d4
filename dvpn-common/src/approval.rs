//! The approval: what the pool signs, the client carries and the provider checks.
//!
//! `dvpn-approval-v1\0`, then each field with its length as a big-endian u32 before it: pool id, provider id, provider
//! key (32 bytes), client key (32), addresses (text, comma-separated prefixes), issued at and expires at (Unix seconds,
//! i64 big-endian), serial (u64 big-endian). The bytes are carried as they were signed and never rebuilt.

use ipnetwork::IpNetwork;
use jiff::Timestamp;

use crate::{
    ids::{self, ProviderId},
    keys::PublicKey,
    limits::{MAX_APPROVAL_LIFE, MAX_CLOCK_SKEW},
};

const MAGIC: &[u8] = b"dvpn-approval-v1\0";
/// Longest encoding accepted, in bytes.
pub const MAX_APPROVAL_BYTES: usize = 1024;

/// The fields of an approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalFields {
    /// Which pool signed.
    pub pool_id: String,
    /// For which provider.
    pub provider_id: ProviderId,
    /// The provider's WireGuard key.
    pub provider_key: PublicKey,
    /// The client's WireGuard key.
    pub client_key: PublicKey,
    /// The client's inner addresses: /32 and /128.
    pub addresses: Vec<IpNetwork>,
    /// Start of validity.
    pub issued_at: Timestamp,
    /// End of validity.
    pub expires_at: Timestamp,
    /// Grows with each approval of the pool; a lower one than last seen for a client key is refused.
    pub serial: u64,
}

/// Why bytes are no approval.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too short, too long, or not our magic.
    #[error("not an approval of version 1")]
    Format,
    /// A field does not read.
    #[error("the approval's {0} does not read")]
    Field(&'static str),
    /// Bytes after the last field.
    #[error("the approval has {0} bytes too many")]
    Trailing(usize),
    /// Not valid yet, beyond the allowed skew of clocks.
    #[error("the approval is valid only from {0} on: check this machine's clock")]
    Early(Timestamp),
    /// Over.
    #[error("the approval ended at {0}")]
    Expired(Timestamp),
    /// Longer than [`MAX_APPROVAL_LIFE`], or ends before it begins.
    #[error("the approval's life is not between 0 and 24 hours")]
    Life,
}

pub(crate) fn push_field(out: &mut Vec<u8>, field: &[u8]) {
    // Fields are bounded far below 4 GiB; saturating would break the signature, not memory.
    out.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(field);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn field(&mut self, name: &'static str) -> Result<&'a [u8], Error> {
        let (length, rest) = self.0.split_first_chunk::<4>().ok_or(Error::Field(name))?;
        let length = usize::try_from(u32::from_be_bytes(*length))
            .ok()
            .ok_or(Error::Field(name))?;
        let (field, rest) = rest.split_at_checked(length).ok_or(Error::Field(name))?;
        self.0 = rest;
        Ok(field)
    }
    fn array<const N: usize>(&mut self, name: &'static str) -> Result<[u8; N], Error> {
        self.field(name)?.try_into().ok().ok_or(Error::Field(name))
    }
    fn text(&mut self, name: &'static str) -> Result<&'a str, Error> {
        std::str::from_utf8(self.field(name)?).ok().ok_or(Error::Field(name))
    }
    fn key(&mut self, name: &'static str) -> Result<PublicKey, Error> {
        PublicKey::from_bytes(self.array(name)?).ok().ok_or(Error::Field(name))
    }
    fn time(&mut self, name: &'static str) -> Result<Timestamp, Error> {
        Timestamp::from_second(i64::from_be_bytes(self.array(name)?))
            .ok()
            .ok_or(Error::Field(name))
    }
}

impl ApprovalFields {
    /// The bytes to sign.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let addresses = self
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",");
        push_field(&mut out, self.pool_id.as_bytes());
        push_field(&mut out, self.provider_id.as_str().as_bytes());
        push_field(&mut out, self.provider_key.as_bytes());
        push_field(&mut out, self.client_key.as_bytes());
        push_field(&mut out, addresses.as_bytes());
        push_field(&mut out, &self.issued_at.as_second().to_be_bytes());
        push_field(&mut out, &self.expires_at.as_second().to_be_bytes());
        push_field(&mut out, &self.serial.to_be_bytes());
        out
    }

    /// Reads signed bytes; whoever calls this has checked the signature over exactly them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_APPROVAL_BYTES {
            return Err(Error::Format);
        }
        let mut reader = Reader(bytes.strip_prefix(MAGIC).ok_or(Error::Format)?);
        let pool_id = reader.text("pool id")?;
        if pool_id.len() > ids::MAX_ID_BYTES {
            return Err(Error::Field("pool id"));
        }
        let fields = Self {
            pool_id: pool_id.to_owned(),
            provider_id: reader
                .text("provider id")?
                .parse()
                .ok()
                .ok_or(Error::Field("provider id"))?,
            provider_key: reader.key("provider key")?,
            client_key: reader.key("client key")?,
            addresses: reader
                .text("addresses")?
                .split(',')
                .map(|text| {
                    text.parse::<IpNetwork>()
                        .ok()
                        .filter(is_host)
                        .ok_or(Error::Field("addresses"))
                })
                .collect::<Result<_, _>>()?,
            issued_at: reader.time("issue time")?,
            expires_at: reader.time("expiry")?,
            serial: u64::from_be_bytes(reader.array("serial")?),
        };
        if reader.0.is_empty() {
            Ok(fields)
        } else {
            Err(Error::Trailing(reader.0.len()))
        }
    }

    /// Whether the approval holds at `now`, allowing [`MAX_CLOCK_SKEW`] on both ends.
    pub fn check_time(&self, now: Timestamp) -> Result<(), Error> {
        let (issued, expires, now) = (self.issued_at.as_second(), self.expires_at.as_second(), now.as_second());
        let skew = i64::try_from(MAX_CLOCK_SKEW.as_secs()).unwrap_or(0);
        let life = i64::try_from(MAX_APPROVAL_LIFE.as_secs()).unwrap_or(0);
        if expires <= issued || expires - issued > life {
            Err(Error::Life)
        } else if issued > now + skew {
            Err(Error::Early(self.issued_at))
        } else if expires + skew <= now {
            Err(Error::Expired(self.expires_at))
        } else {
            Ok(())
        }
    }
}

fn is_host(network: &IpNetwork) -> bool {
    match network {
        IpNetwork::V4(v4) => v4.prefix() == 32,
        IpNetwork::V6(v6) => v6.prefix() == 128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> ApprovalFields {
        ApprovalFields {
            pool_id: "pool".into(),
            provider_id: "provider-a".parse().unwrap(),
            provider_key: PublicKey::from_bytes([1; 32]).unwrap(),
            client_key: PublicKey::from_bytes([2; 32]).unwrap(),
            addresses: vec!["10.96.0.2/32".parse().unwrap(), "fd00::2/128".parse().unwrap()],
            issued_at: Timestamp::from_second(1_000_000).unwrap(),
            expires_at: Timestamp::from_second(1_003_600).unwrap(),
            serial: 7,
        }
    }

    #[test]
    fn what_is_encoded_decodes() {
        assert_eq!(ApprovalFields::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn truncated_and_extended_approvals_are_refused() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            assert!(ApprovalFields::decode(&bytes[..length]).is_err(), "{length}");
        }
        let mut long = bytes;
        long.push(0);
        assert_eq!(ApprovalFields::decode(&long), Err(Error::Trailing(1)));
    }

    #[test]
    fn addresses_are_single_hosts() {
        let mut fields = sample();
        fields.addresses = vec!["10.96.0.0/20".parse().unwrap()];
        assert_eq!(ApprovalFields::decode(&fields.encode()), Err(Error::Field("addresses")));
    }

    #[test]
    fn validity_allows_two_minutes_of_skew_and_a_day_of_life() {
        let at = |s| Timestamp::from_second(s).unwrap();
        assert_eq!(sample().check_time(at(1_000_000 - 120)), Ok(()));
        assert!(matches!(sample().check_time(at(1_000_000 - 121)), Err(Error::Early(_))));
        assert_eq!(sample().check_time(at(1_003_600 + 119)), Ok(()));
        assert!(matches!(
            sample().check_time(at(1_003_600 + 120)),
            Err(Error::Expired(_))
        ));
        let mut long = sample();
        long.expires_at = at(1_000_000 + 24 * 3600 + 1);
        assert_eq!(long.check_time(at(1_000_000)), Err(Error::Life));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend_from_slice(&bytes);
            drop(ApprovalFields::decode(&with_magic));
            prop_assert!(ApprovalFields::decode(&bytes).is_err() || bytes.starts_with(MAGIC));
        }
    }
}
