//! Why there is no approval, and what to do next.

use dvpn_common::{approval as signed, ids::ProviderId};
use jiff::Timestamp;

use crate::{Failure, Retry, directory, pool_key};

/// Why there is no approval.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The subscription ended before the answer came.
    #[error("the subscription ended at {0}")]
    SubscriptionOver(Timestamp),
    /// 401 or 402: the pool does not take the token.
    #[error("the pool does not accept the payment token (HTTP {status}): {said}")]
    Token {
        /// 401 or 402.
        status: u16,
        /// What it says, shortened.
        said: String,
    },
    /// 403, 404, 409, or `approved: false`: not at this provider.
    #[error("the pool denies us provider {provider} (HTTP {status}): {said}")]
    Denied {
        /// Which.
        provider: ProviderId,
        /// 2xx, 403, 404 or 409.
        status: u16,
        /// What it says, shortened.
        said: String,
    },
    /// 503: the provider did not acknowledge us in time.
    #[error("provider {provider} did not acknowledge us to the pool in time")]
    ProviderSilent {
        /// Which.
        provider: ProviderId,
    },
    /// Any other status.
    #[error("the pool answers HTTP {status} to the approval request: {said}")]
    Status {
        /// Which.
        status: u16,
        /// What it says, shortened.
        said: String,
    },
    /// A yes that does not read.
    #[error("the {from} answer does not read: {reason}")]
    Unreadable {
        /// `approval`, `provisioning` or `lease renewal`.
        from: &'static str,
        /// Why, shortened.
        reason: String,
    },
    /// A pool key is known and the answer is not signed.
    #[error("the approval is not signed, and this pool's key is known")]
    Unsigned,
    /// The signature is not the pool's over these bytes.
    #[error("the approval's signature is not the pool's")]
    Signature,
    /// The pool shows another key than the known one, and nothing leads there.
    #[error("the approval is signed by a key that is not believed: {0}")]
    PoolKey(#[source] pool_key::Error),
    /// The signed bytes do not read, or do not hold now.
    #[error("the signed approval is refused: {0}")]
    Signed(#[source] signed::Error),
    /// An approval from before one that was already taken.
    #[error("the approval has serial {serial}, and {seen} was already seen")]
    Older {
        /// Its serial.
        serial: u64,
        /// The highest seen.
        seen: u64,
    },
    /// The answer, or what is signed, is about something else than was asked.
    #[error("the approval's {field} is not the one asked for")]
    Mismatch {
        /// Which field.
        field: &'static str,
    },
    /// An address that cannot be ours.
    #[error("the {field} {address} is refused: {reason}")]
    Address {
        /// `address` or `gateway`.
        field: &'static str,
        /// Which.
        address: String,
        /// Why.
        reason: &'static str,
    },
    /// No address from the pool and none configured.
    #[error("no tunnel address: the answer has none and WG_ADDRESS is not set")]
    NoAddress,
    /// The approval is already over.
    #[error("the approval ended at {0}")]
    Over(Timestamp),
    /// A lease that cannot be named in a path.
    #[error("the lease id is refused: it must be 1 to 128 letters, digits, - and _")]
    LeaseId,
    /// The orchestrator's provider is not one.
    #[error("the orchestrator's provider is refused: {0}")]
    Offer(#[source] directory::Error),
}

impl Error {
    /// What to do next.
    pub fn retry(&self) -> Retry {
        match self {
            Self::SubscriptionOver(_) | Self::Token { .. } | Self::NoAddress => Retry::Never,
            // About this provider: the next candidate may do better.
            Self::Denied { .. }
            | Self::ProviderSilent { .. }
            | Self::Mismatch { .. }
            | Self::Address { .. }
            | Self::Over(_) => Retry::Now,
            Self::Status { .. }
            | Self::Unreadable { .. }
            | Self::Unsigned
            | Self::Signature
            | Self::PoolKey(_)
            | Self::Signed(_)
            | Self::Older { .. }
            | Self::LeaseId
            | Self::Offer(_) => Retry::Backoff,
        }
    }

    fn how(&self) -> &'static str {
        match self {
            Self::SubscriptionOver(_) => "pay for the next month (the D-Bus method Payments)",
            Self::Token { .. } => "check that the stored token is for this pool, or pay for a new one",
            Self::Denied { .. } | Self::ProviderSilent { .. } => "the next provider is tried",
            Self::Status { .. } => "it will be asked again; check POOL_URL if this stays",
            Self::Unreadable { .. } => "check that POOL_URL and FALLBACK_ORCHESTRATOR_URL name such services",
            Self::Unsigned | Self::Signature | Self::PoolKey(_) => {
                "if the pool changed its key, set POOL_PUBLIC_KEY to the new one; otherwise somebody stands between"
            }
            Self::Older { .. } => {
                "the pool, or somebody between, shows an old approval; if the pool was set up anew, remove the file pool \
                 from the state directory"
            }
            Self::Signed(_) => "check this machine's clock; otherwise tell the pool's operator",
            Self::Mismatch { .. } | Self::Address { .. } | Self::Over(_) | Self::LeaseId | Self::Offer(_) => {
                "tell the operator of the service that answered"
            }
            Self::NoAddress => "set WG_ADDRESS to the tunnel address this pool gave you",
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            what: error.to_string(),
            how: error.how().to_owned(),
            retry: error.retry(),
        }
    }
}
