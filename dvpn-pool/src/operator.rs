//! What an operator does beside a running pool: it follows within a second.

use std::{io::Read as _, path::PathBuf, process::ExitCode};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use dvpn_common::{contract::KeyRotation, directory::rotation_bytes, ids::ProviderId};
use dvpn_pool::{
    cli::{Options, Revoke, with_causes},
    pool::key_path,
    signing::{KeyRing, sha256},
    store::Store,
};
use jiff::Timestamp;
use zeroize::Zeroizing;

use crate::{database, fail, say};

/// Longest token that is read: real ones have 68 characters.
const MAX_TOKEN_BYTES: u64 = 4096;

/// The database that a running pool uses, and where it is.
async fn opened(options: Options) -> Result<(PathBuf, Store), ExitCode> {
    let path = database(options)?;
    match Store::open(&path).await {
        Ok(store) => Ok((path, store)),
        Err(error) => Err(fail(&with_causes(&error), 1)),
    }
}

/// `dvpn-pool revoke`
pub(crate) async fn revoke(options: Options, which: Revoke) -> ExitCode {
    let (_, store) = match opened(options).await {
        Ok(opened) => opened,
        Err(code) => return code,
    };
    let now = Timestamp::now();
    let done = if let Some(checkout) = &which.checkout {
        store.revoke_checkout(checkout, &which.reason, now).await
    } else {
        let mut token = Zeroizing::new(String::new());
        if let Err(error) = std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut token) {
            return fail(&format!("the token cannot be read from standard input: {error}"), 1);
        }
        let hash = sha256(token.trim().as_bytes());
        store.revoke_token(&hash, &which.reason, now).await
    };
    store.close().await;
    match done {
        Ok(true) => say("revoked: the running pool ends its connections within a second"),
        Ok(false) => fail("there is no such checkout or token, or it was revoked before", 1),
        Err(error) => fail(&with_causes(&error), 1),
    }
}

/// `dvpn-pool standby-node`
pub(crate) async fn set_standby(options: Options, id: ProviderId, standby: bool) -> ExitCode {
    let (_, store) = match opened(options).await {
        Ok(opened) => opened,
        Err(code) => return code,
    };
    let done = store.set_standby(&id, standby).await;
    store.close().await;
    match done {
        Ok(true) => say("done: the running pool follows within a second"),
        Ok(false) => fail(&format!("there is no node {id}"), 1),
        Err(error) => fail(&with_causes(&error), 1),
    }
}

/// `dvpn-pool rotate-key`
pub(crate) async fn rotate_key(options: Options) -> ExitCode {
    let (path, store) = match opened(options).await {
        Ok(opened) => opened,
        Err(code) => return code,
    };
    let current = match store.pool_key().await {
        Ok(Some(current)) => current,
        Ok(None) => return fail("this database has no key yet: let the pool serve once", 1),
        Err(error) => return fail(&with_causes(&error), 1),
    };
    let file = key_path(&path);
    let (ring, fresh) = match KeyRing::open(&file, Some(current)).and_then(|ring| Ok((ring, KeyRing::add(&file)?))) {
        Ok(keys) => keys,
        Err(error) => return fail(&with_causes(&error), 1),
    };
    let to = fresh.public();
    let rotation = KeyRotation {
        from: current,
        to,
        signature: STANDARD.encode(ring.current().sign(&rotation_bytes(&current, &to))),
    };
    let done = store.rotate_key(&rotation).await;
    store.close().await;
    match done {
        Ok(true) => say(&format!(
            "the pool signs with {to} within a second; {} now holds that key too: back it up",
            file.display()
        )),
        Ok(false) => fail("another rotation came first; nothing was changed", 1),
        Err(error) => fail(&with_causes(&error), 1),
    }
}
