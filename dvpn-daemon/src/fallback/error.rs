//! Why no provider was made.

use std::{io, process::ExitStatus, time::Duration};

use dvpn_core::{Failure, Retry};

use crate::control_plane;

use super::{Untrusted, run::MAX_OUTPUT_BYTES};

/// Why the fallback script made no provider.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The script is not one to run.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The runtime ended.
    #[error("opening the fallback script was interrupted")]
    Interrupted {
        /// By what.
        #[source]
        source: tokio::task::JoinError,
    },
    /// In device mode: no socket for its connections.
    #[error("making the fallback script's way to the orchestrator")]
    Door {
        /// Why.
        #[source]
        source: control_plane::Error,
    },
    /// The request does not encode.
    #[error("the request for the fallback script does not encode")]
    Encode {
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It does not start.
    #[error("the fallback script {script} does not start: is its interpreter there?")]
    Start {
        /// Which.
        script: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It runs and cannot be watched.
    #[error("the fallback script cannot be watched ({action})")]
    Watch {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("the fallback script did not end within {0:?} and was killed")]
    TimedOut(Duration),
    /// It prints without end.
    #[error("the fallback script printed more than {MAX_OUTPUT_BYTES} bytes and was killed")]
    TooMuch,
    /// It ended, and something it started outside its process group still holds its output.
    #[error("the fallback script ended and left its output open to another program")]
    StillOpen,
    /// It failed; whatever it printed before does not count.
    #[error("the fallback script failed ({status}): {said}")]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error, without the token.
        said: String,
    },
}

impl Error {
    /// What to do next: the pool may be back by then.
    pub fn retry(&self) -> Retry {
        Retry::Backoff
    }

    fn how(&self) -> &'static str {
        match self {
            Self::Untrusted(_) | Self::Start { .. } => "correct FALLBACK_SCRIPT_PATH",
            Self::Interrupted { .. } | Self::Door { .. } | Self::Encode { .. } | Self::Watch { .. } => "trying again",
            Self::TimedOut(_) => "check FALLBACK_ORCHESTRATOR_URL and the network, or raise FALLBACK_TIMEOUT_SECONDS",
            Self::TooMuch | Self::StillOpen => "correct the script: it prints one JSON object and ends",
            Self::Failed { .. } => {
                "check FALLBACK_ORCHESTRATOR_URL and FALLBACK_CA_CERT; the log has all that the script said"
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            what: crate::run::chain(&error),
            how: error.how().to_owned(),
            retry: error.retry(),
        }
    }
}
