//! User name and password (RFC 1929).

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
};
use fast_socks5::server::{AuthMethod, AuthMethodSuccessState, SocksServerError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

const VERSION: u8 = 1;
const ACCEPTED: u8 = 0;
const REFUSED: u8 = 1;

/// What a client must know. It has no Debug, and only digests are kept.
pub struct Credentials {
    user: [u8; 32],
    password: [u8; 32],
}

impl Credentials {
    /// Of `SOCKS5_USER` and `SOCKS5_PASSWORD`.
    pub fn new(user: &str, password: &str) -> Self {
        Self {
            user: sha256(user.as_bytes()),
            password: sha256(password.as_bytes()),
        }
    }

    /// In constant time, so that neither half can be guessed byte by byte.
    fn accept(&self, user: &[u8], password: &[u8]) -> bool {
        let user = verify_slices_are_equal(&self.user, &sha256(user)).is_ok();
        let password = verify_slices_are_equal(&self.password, &sha256(password)).is_ok();
        user & password
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.iter_mut()
        .zip(digest(&SHA256, bytes).as_ref())
        .for_each(|(to, from)| *to = *from);
    out
}

/// The method. The protocol library's own writes passwords to its debug log; this one keeps them in wiped memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Password;

pub(super) struct Started<T>(T);
pub(super) struct Accepted<T>(T);

impl<T> AuthMethod<T> for Password {
    type StartingState = Started<T>;
    fn method_id(self) -> u8 {
        2
    }
    fn new(self, inner: T) -> Started<T> {
        Started(inner)
    }
}

impl<T> AuthMethodSuccessState<T> for Accepted<T> {
    fn into_inner(self) -> T {
        self.0
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Started<T> {
    /// Reads user and password and answers.
    pub(super) async fn check(mut self, credentials: &Credentials) -> Result<Accepted<T>, SocksServerError> {
        let failed = |source| SocksServerError::Io {
            source,
            context: "reading user and password",
        };
        let version = self.0.read_u8().await.map_err(failed)?;
        let user = read_field(&mut self.0).await.map_err(failed)?;
        let password = read_field(&mut self.0).await.map_err(failed)?;
        let accepted = version == VERSION && credentials.accept(&user, &password);
        let answer = [VERSION, if accepted { ACCEPTED } else { REFUSED }];
        self.0.write_all(&answer).await.map_err(|source| SocksServerError::Io {
            source,
            context: "answering user and password",
        })?;
        if accepted {
            Ok(Accepted(self.0))
        } else {
            Err(SocksServerError::AuthenticationRejected)
        }
    }
}

async fn read_field(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let length = from.read_u8().await?;
    let mut field = Zeroizing::new(vec![0; usize::from(length)]);
    from.read_exact(&mut field).await?;
    Ok(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_must_match() {
        let credentials = Credentials::new("user", "password");
        assert!(credentials.accept(b"user", b"password"));
        for (user, password) in [
            ("user", "passwore"),
            ("usep", "password"),
            ("", ""),
            ("user", ""),
            ("password", "user"),
        ] {
            assert!(!credentials.accept(user.as_bytes(), password.as_bytes()));
        }
    }
}
