//! The protocol up to the request: which method, who, what and where to.

use fast_socks5::{
    Socks5Command,
    server::{
        AuthMethodSuccessState, NoAuthentication, Socks5ServerProtocol, SocksServerError,
        states::{Authenticated, CommandRead},
    },
    util::target_addr::TargetAddr,
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::auth::{Credentials, Password};

/// What a client asks for, and the connection to answer it on.
pub(crate) type Request<T> = (Socks5ServerProtocol<T, CommandRead>, Socks5Command, TargetAddr);

/// Reads a request. With `credentials` no other method than user and password is accepted, without them none but none.
pub(crate) async fn read<T: AsyncRead + AsyncWrite + Unpin>(
    client: T,
    credentials: Option<&Credentials>,
) -> Result<Request<T>, SocksServerError> {
    let opened = Socks5ServerProtocol::start(client);
    let ready: Socks5ServerProtocol<T, Authenticated> = match credentials {
        None => opened.negotiate_auth(&[NoAuthentication]).await?.finish_auth(),
        Some(credentials) => opened
            .negotiate_auth(&[Password])
            .await?
            .check(credentials)
            .await?
            .finish_auth(),
    };
    ready.read_command().await
}
