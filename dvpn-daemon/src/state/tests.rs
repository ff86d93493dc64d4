use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

use dvpn_core::payment::{Verification, judge};
use jiff::Timestamp;
use tempfile::TempDir;

use super::*;

fn secret(text: &str) -> Secret {
    Secret::new(text)
}

fn open(directory: &TempDir) -> State {
    State::open(&directory.path().join("state"), None).unwrap()
}

fn file(directory: &TempDir, name: &str) -> PathBuf {
    directory.path().join("state").join(name)
}

fn paid() -> Subscription {
    let body =
        br#"{"active":true,"wallet":"1MUss4jmaRJ2sMtS9gyZqeRw8WrhWTsrxn","interval":"monthly","amount_usd":9.99}"#;
    match judge(200, body, Timestamp::from_second(1_800_000_000).unwrap()) {
        Verification::Paid(subscription) => subscription,
        other @ (Verification::NotPaid(_) | Verification::CannotTell(_)) => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_stored_is_there_after_a_restart_and_private() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = "198.51.100.7:51820".parse().unwrap();
    let pool_key = VerifyingKey::from_bytes([7; 32]).unwrap();
    let state = open(&directory);
    assert!(state.token().await.unwrap().is_none());
    assert!(!state.wish());
    state.store_token(&secret("token-1")).await.unwrap();
    state.store_subscription(&paid(), &secret("token-1")).await.unwrap();
    state.store_wish(true).unwrap();
    state.store_last_endpoint(endpoint).unwrap();
    state.store_pool_key(&pool_key).unwrap();
    let (user, node) = (state.user_id().unwrap(), state.node_id().unwrap());
    let (seed, key) = (
        state.identity_seed().await.unwrap(),
        state.provider_key().await.unwrap(),
    );

    let again = open(&directory);
    assert_eq!(again.token().await.unwrap().unwrap().expose(), "token-1");
    assert_eq!(again.subscription(&secret("token-1")).await.unwrap(), Some(paid()));
    assert_eq!(
        again.subscription(&secret("token-2")).await.unwrap(),
        None,
        "of another token"
    );
    assert!(again.wish());
    assert_eq!(again.last_endpoint(), Some(endpoint));
    assert_eq!(again.pool_key().unwrap(), Some(pool_key));
    assert_eq!(
        (again.user_id().unwrap(), again.node_id().unwrap()),
        (user.clone(), node)
    );
    assert_eq!(*again.identity_seed().await.unwrap(), *seed);
    assert_eq!(again.provider_key().await.unwrap().expose(), key.expose());
    assert_eq!(user.as_str().len(), 32);

    assert_eq!(
        fs::metadata(directory.path().join("state")).unwrap().mode() & 0o777,
        0o700
    );
    for entry in fs::read_dir(directory.path().join("state")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().mode() & 0o777,
            0o600,
            "{:?}",
            entry.file_name()
        );
        let bytes = fs::read(entry.path()).unwrap();
        assert!(
            !bytes.windows(7).any(|window| window == b"token-1"),
            "{:?}",
            entry.file_name()
        );
    }
}

#[tokio::test]
async fn another_passphrase_is_told_from_damage_and_nothing_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let state = State::open(&path, Some(&secret("one"))).unwrap();
    state.store_token(&secret("token-1")).await.unwrap();
    let other = State::open(&path, Some(&secret("two"))).unwrap();
    assert!(matches!(
        other.token().await,
        Err(Error::Sealed {
            source: seal::Error::OtherKey,
            ..
        })
    ));
    let keyed = State::open(&path, None).unwrap();
    assert!(matches!(
        keyed.token().await,
        Err(Error::Sealed {
            source: seal::Error::OtherSealing(_),
            ..
        })
    ));

    let before = fs::read(path.join("token")).unwrap();
    other.store_token(&secret("token-2")).await.unwrap();
    assert_eq!(other.token().await.unwrap().unwrap().expose(), "token-2");
    assert_eq!(fs::read(path.join("token.kept-1")).unwrap(), before);
    // What does open is replaced without a copy.
    other.store_token(&secret("token-3")).await.unwrap();
    assert!(!path.join("token.kept-2").exists());
}

#[tokio::test]
async fn damaged_truncated_and_newer_files_are_named_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let state = open(&directory);
    state.store_token(&secret("token-1")).await.unwrap();
    state.identity_seed().await.unwrap();
    for name in ["token", "identity"] {
        let good = fs::read(file(&directory, name)).unwrap();
        for (what, bytes) in [
            ("truncated", good[..40].to_vec()),
            ("damaged", [&good[..60], &[good[60] ^ 1], &good[61..]].concat()),
            ("newer version", [&good[..8], &[9], &good[9..]].concat()),
        ] {
            fs::write(file(&directory, name), &bytes).unwrap();
            let error = if name == "token" {
                state.token().await.map(|_| ()).unwrap_err()
            } else {
                state.identity_seed().await.map(|_| ()).unwrap_err()
            };
            let text = error.to_string();
            assert!(text.contains(name) && text.contains(what), "{text}");
            assert_eq!(fs::read(file(&directory, name)).unwrap(), bytes, "left as it was");
        }
    }
}

#[tokio::test]
async fn a_wish_that_does_not_read_is_a_wish() {
    let directory = tempfile::tempdir().unwrap();
    let state = open(&directory);
    state.store_wish(false).unwrap();
    assert!(!open(&directory).wish());
    fs::write(file(&directory, "wish"), b"").unwrap();
    assert!(state.wish());
    fs::write(file(&directory, "wish"), [0xff; 10]).unwrap();
    assert!(state.wish());
    fs::remove_file(file(&directory, "wish")).unwrap();
    fs::create_dir(file(&directory, "wish")).unwrap();
    assert!(state.wish());
}

#[test]
fn an_exposed_key_file_and_a_damaged_id_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let state = open(&directory);
    state.user_id().unwrap();
    fs::write(file(&directory, "user-id"), "a b").unwrap();
    assert!(matches!(state.user_id(), Err(Error::Damaged { .. })));
    fs::set_permissions(file(&directory, "sealing.key"), fs::Permissions::from_mode(0o640)).unwrap();
    let again = State::open(&directory.path().join("state"), None);
    assert!(matches!(again.map(|_| ()), Err(Error::Exposed { mode: 0o640, .. })));
}

#[test]
fn a_crash_in_the_middle_of_a_write_leaves_the_old_file() {
    let directory = tempfile::tempdir().unwrap();
    let state = open(&directory);
    state.store_wish(true).unwrap();
    fs::write(file(&directory, "wish.1-1.new"), b"no").unwrap();
    assert!(open(&directory).wish());
    assert!(!file(&directory, "wish.1-1.new").exists());
}

#[test]
fn a_state_directory_has_one_user_and_the_next_is_told_who_that_is() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let held = Lock::take(&state).unwrap();
    let refused = Lock::take(&state).unwrap_err().to_string();
    let who = format!("process {}", std::process::id());
    assert!(
        refused.contains(&who) && refused.contains("STATE_DIRECTORY"),
        "{refused}"
    );
    drop(held);
    let again = Lock::take(&state).unwrap();
    assert!(State::open(&state, None).is_ok(), "the lock is in nobody's way");
    fs::write(state.join("lock"), "who knows").unwrap();
    assert!(
        Lock::take(&state)
            .unwrap_err()
            .to_string()
            .starts_with("another process")
    );
    drop(again);
}
