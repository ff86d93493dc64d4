//! What can go wrong with measuring a line.

use dvpn_core::{Failure, Retry, line::samples::TooLittle};

use crate::http::{self, Target};

/// Why a transfer says nothing of the line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The exchange failed.
    #[error(transparent)]
    Http(#[from] http::Error),
    /// A file too short to measure with.
    #[error(
        "the file at {target} ends after {bytes} bytes, too early to measure with: give BANDWIDTH_TEST_URL one of 25 MB"
    )]
    TooShort {
        /// Whose.
        target: Target,
        /// What it had.
        bytes: u64,
    },
    /// Hardly anything came.
    #[error("measuring with {target}: {source}: see whether the network works")]
    TooLittle {
        /// With whom.
        target: Target,
        /// How little.
        #[source]
        source: TooLittle,
    },
    /// An answer to what was not sent yet.
    #[error(
        "{target} answers an upload before it has it, which measures nothing: give BANDWIDTH_TEST_URL another server"
    )]
    Early {
        /// Who.
        target: Target,
    },
    /// It does not say that it got what it was sent.
    #[error(
        "{target} does not say that it got the bytes it was sent, as a pool's /speed does: give BANDWIDTH_TEST_URL \
         another server"
    )]
    Disagrees {
        /// Who.
        target: Target,
    },
    /// No random bytes.
    #[error("the operating system gives no random numbers")]
    Random,
}

impl Error {
    /// Whether the server is busy: it may let us in a moment later.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Http(http::Error::Status { status, .. }) if matches!(status.as_u16(), 429 | 503))
    }

    /// Whether this server says the same tomorrow: neither another connection nor another try makes up for it.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Http(http::Error::Status { status, .. }) => {
                status.is_client_error() && !matches!(status.as_u16(), 408 | 429)
            }
            Self::TooShort { .. }
            | Self::Early { .. }
            | Self::Disagrees { .. }
            | Self::Random
            | Self::Http(
                http::Error::Redirect { .. } | http::Error::TooLarge { .. } | http::Error::Compressed { .. },
            ) => true,
            Self::Http(_) | Self::TooLittle { .. } => false,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Http(error) => error.into(),
            Error::TooShort { .. }
            | Error::TooLittle { .. }
            | Error::Early { .. }
            | Error::Disagrees { .. }
            | Error::Random => {
                let text = error.to_string();
                let (what, how) = text.rsplit_once(": ").unwrap_or((&text, "try later"));
                Self {
                    what: what.to_owned(),
                    how: how.to_owned(),
                    retry: Retry::Backoff,
                }
            }
        }
    }
}
