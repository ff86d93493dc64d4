//! What can go wrong between a request and its body, each with the server it happened at and what to do.

use std::{error::Error as StdError, fmt, io, path::PathBuf};

use dvpn_core::{Failure, Retry};
use reqwest::{Response, StatusCode, header::LOCATION};
use rustls::{AlertDescription, CertificateError, pki_types::pem};
use url::Url;

use crate::control_plane;

/// Where a request went: scheme, host, port and path. Never a query, a user or a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(String);

impl Target {
    /// Of this address.
    pub fn of(url: &Url) -> Self {
        Self(format!("{}{}", origin(url), url.path()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn origin(url: &Url) -> String {
    let host = url.host_str().unwrap_or("");
    match url.port() {
        Some(port) => format!("{}://{host}:{port}", url.scheme()),
        None => format!("{}://{host}", url.scheme()),
    }
}

/// Why TLS failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsProblem {
    /// No root that we trust signed the certificate.
    Untrusted,
    /// The certificate is for other names.
    WrongName,
    /// The certificate is over, or not yet valid.
    Expired,
    /// The server speaks nothing from TLS 1.2 on.
    Version,
    /// The server does not speak TLS at all.
    NotTls,
    /// Anything else.
    Other,
}

impl fmt::Display for TlsProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untrusted => {
                "no authority this machine trusts signed its certificate: install the CA, or name it in SSL_CERT_FILE"
            }
            Self::WrongName => "its certificate is for another name: correct the URL, or ask the server's operator",
            Self::Expired => {
                "its certificate is not valid at this time: check this machine's clock, then ask the server's operator"
            }
            Self::Version => "it speaks no TLS 1.2 or newer: ask the server's operator for a newer one",
            Self::NotTls => "it answers something that is not TLS: check the port, https is required",
            Self::Other => {
                "the TLS handshake failed: ask the server's operator, or look for a device that intercepts it"
            }
        })
    }
}

/// Why a request has no answer, or none that may be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an https address.
    #[error("{target} is not an https:// address: correct it in the configuration")]
    NotHttps {
        /// What was asked for.
        target: Target,
    },
    /// The file of roots does not read.
    #[error("reading the CA certificates in {}: it must be a readable PEM file", file.display())]
    CaFile {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// The file of roots holds something that is no certificate.
    #[error("the CA file {} holds a damaged certificate: replace it", file.display())]
    CaCertificate {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The file of roots holds none.
    #[error("the CA file {} holds no certificate: put the authority's PEM certificate there", file.display())]
    CaEmpty {
        /// Which.
        file: PathBuf,
    },
    /// The system has no roots.
    #[error("this machine has no root certificates: install the package ca-certificates, or set SSL_CERT_FILE")]
    NoRoots {
        /// The first problem met while reading them.
        #[source]
        source: Option<rustls_native_certs::Error>,
    },
    /// TLS could not be set up.
    #[error("setting up TLS: this is a defect, please report it")]
    TlsSetup {
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The client could not be built.
    #[error("setting up the HTTPS client: this is a defect, please report it")]
    Build {
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The daemon is stopping.
    #[error("the HTTPS client was not built because the daemon is stopping: start it again")]
    Interrupted {
        /// Why.
        #[source]
        source: tokio::task::JoinError,
    },
    /// The body could not be written.
    #[error("writing the request to {target}: this is a defect, please report it")]
    Encode {
        /// To whom.
        target: Target,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// No TLS.
    #[error("no secure connection to {target}: {problem}")]
    Tls {
        /// To whom.
        target: Target,
        /// What.
        problem: TlsProblem,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// No TCP connection, or no address for the name.
    #[error("no connection to {target}: check the network, the name and that the server runs")]
    Connect {
        /// To whom.
        target: Target,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Too slow.
    #[error("{target} did not {what} in time: check the network, or try later")]
    Timeout {
        /// Who.
        target: Target,
        /// `accept a connection`, `answer` or `finish its answer`.
        what: &'static str,
    },
    /// The answer broke off, or is no HTTP.
    #[error("the answer of {target} is damaged or incomplete: try later, or ask the server's operator")]
    Broken {
        /// Whose.
        target: Target,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Redirects are not followed: they could lead a token anywhere.
    #[error("{target} redirects to {to}, which is not followed: put the final address into the configuration")]
    Redirect {
        /// Who.
        target: Target,
        /// The host it names; its path may carry secrets and is left out.
        to: String,
    },
    /// No connection of ours beside the tunnel.
    #[error("reaching {target}: see whether the network and its name servers work")]
    NoWay {
        /// Who.
        target: Target,
        /// Why.
        #[source]
        source: Box<control_plane::Error>,
    },
    /// More bytes than the contract allows.
    #[error("the answer of {target} is longer than {limit} bytes and was given up: ask the server's operator")]
    TooLarge {
        /// Whose.
        target: Target,
        /// The limit in bytes.
        limit: usize,
    },
    /// Compressed bytes say nothing of the line.
    #[error("{target} sends compressed bytes, which say nothing of the line: give BANDWIDTH_TEST_URL another server")]
    Compressed {
        /// Who.
        target: Target,
    },
    /// An answer that says no.
    #[error("{target} answered {status}{}: {}", quoted(said.as_deref()), status_advice(*status))]
    Status {
        /// Who.
        target: Target,
        /// What.
        status: StatusCode,
        /// The server's own words, printable and short.
        said: Option<String>,
    },
}

fn quoted(said: Option<&str>) -> String {
    said.map(|text| format!(" ({text})")).unwrap_or_default()
}

fn status_advice(status: StatusCode) -> &'static str {
    if status == StatusCode::TOO_MANY_REQUESTS {
        "wait a little"
    } else if status.is_server_error() {
        "try later, or ask the server's operator"
    } else {
        "check the address in the configuration"
    }
}

impl Error {
    /// Sorts what the HTTP client says.
    pub fn from_request(url: &Url, source: reqwest::Error) -> Self {
        let target = Target::of(url);
        // The URL inside would be printed with its query.
        let source = source.without_url();
        if let Some(tls) = cause::<rustls::Error>(&source) {
            return Self::Tls {
                target,
                problem: tls_problem(tls),
                source: tls.clone(),
            };
        }
        if source.is_timeout() {
            let what = match () {
                () if source.is_connect() => "accept a connection",
                () if source.is_body() || source.is_decode() => "finish its answer",
                () => "answer",
            };
            return Self::Timeout { target, what };
        }
        if source.is_connect() {
            return Self::Connect { target, source };
        }
        Self::Broken { target, source }
    }

    pub(super) fn redirect(url: &Url, response: &Response) -> Self {
        let to = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| url.join(text).ok())
            .map_or_else(|| "nowhere".to_owned(), |to| origin(&to));
        Self::Redirect {
            target: Target::of(url),
            to,
        }
    }

    /// Whether trying again can help.
    pub fn retry(&self) -> Retry {
        match self {
            Self::NotHttps { .. }
            | Self::CaFile { .. }
            | Self::CaCertificate { .. }
            | Self::CaEmpty { .. }
            | Self::NoRoots { .. }
            | Self::TlsSetup { .. }
            | Self::Build { .. }
            | Self::Encode { .. } => Retry::Never,
            // Also TLS and redirects: on a network with a captive portal they pass once somebody has logged in.
            Self::Interrupted { .. }
            | Self::Tls { .. }
            | Self::Connect { .. }
            | Self::NoWay { .. }
            | Self::Timeout { .. }
            | Self::Broken { .. }
            | Self::Redirect { .. }
            | Self::TooLarge { .. }
            | Self::Compressed { .. }
            | Self::Status { .. } => Retry::Backoff,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let retry = error.retry();
        let text = error.to_string();
        // Each message reads "what: how"; the last colon with a space parts them, as addresses hold none.
        let (what, how) = text.rsplit_once(": ").unwrap_or((&text, "try later"));
        Self {
            what: with_causes(what, &error),
            how: how.to_owned(),
            retry,
        }
    }
}

/// The message and the causes below it, each once.
fn with_causes(what: &str, error: &Error) -> String {
    let mut out = what.to_owned();
    let mut next = error.source();
    while let Some(source) = next {
        let text = source.to_string();
        if !out.contains(&text) {
            out = format!("{out} ({text})");
        }
        next = source.source();
    }
    out
}

/// The first cause of this type. An `io::Error` hides the error it carries from the chain, so those are opened.
fn cause<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && let Some(found) = cause::<T>(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls' enums are open; what is not named here is Other"
)]
fn tls_problem(error: &rustls::Error) -> TlsProblem {
    match error {
        rustls::Error::InvalidCertificate(problem) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsProblem::Untrusted,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsProblem::WrongName
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => TlsProblem::Expired,
            _ => TlsProblem::Other,
        },
        rustls::Error::PeerIncompatible(_)
        | rustls::Error::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure) => {
            TlsProblem::Version
        }
        rustls::Error::InvalidMessage(_) => TlsProblem::NotTls,
        _ => TlsProblem::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_names_host_and_path_and_never_user_or_query() {
        let url: Url = "https://user:password@pool.example:8443/providers?token=secret#x"
            .parse()
            .unwrap();
        assert_eq!(Target::of(&url).to_string(), "https://pool.example:8443/providers");
    }

    #[test]
    fn a_failure_says_what_and_how() {
        let url: Url = "https://[2001:db8::1]:8443/providers".parse().unwrap();
        let failure = Failure::from(Error::TooLarge {
            target: Target::of(&url),
            limit: 7,
        });
        assert_eq!(
            failure.what,
            "the answer of https://[2001:db8::1]:8443/providers is longer than 7 bytes and was given up"
        );
        assert_eq!(failure.how, "ask the server's operator");
        assert_eq!(failure.retry, Retry::Backoff);
    }
}
