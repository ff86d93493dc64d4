use proptest::prelude::*;

use super::*;

fn passphrase(text: &str) -> Material {
    Material::Passphrase(Secret::new(text))
}

fn key_file(byte: u8) -> Material {
    Material::KeyFile(Zeroizing::new([byte; 32]))
}

fn sample() -> Vec<u8> {
    seal(&key_file(1), "token", b"secret token", [2; 16], [3; 12]).unwrap()
}

/// Puts a right digest behind changed bytes, as somebody who knows the format would.
fn resum(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() - DIGEST_BYTES);
    let sum = digest(&SHA256, &bytes);
    bytes.extend_from_slice(sum.as_ref());
    bytes
}

#[test]
fn what_is_sealed_opens_and_does_not_show() {
    for material in [key_file(1), passphrase("correct horse")] {
        let sealed = seal(&material, "token", b"secret token", [2; 16], [3; 12]).unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert_eq!(open(&material, "token", &sealed).unwrap().as_slice(), b"secret token");
        assert_eq!(salt_of(&sealed).unwrap(), [2; 16]);
    }
}

#[test]
fn pbkdf2_is_what_the_format_says() {
    // The same derivation by hand: 600,000 rounds, the two labels.
    let mut master = [0_u8; 32];
    pbkdf2::derive(
        pbkdf2::PBKDF2_HMAC_SHA256,
        NonZeroU32::new(600_000).unwrap(),
        &[2; 16],
        b"p",
        &mut master,
    );
    let key = Key::derive(&passphrase("p"), [2; 16]).unwrap();
    assert_eq!(key.check, expand(&master, b"check")[..16]);
}

#[test]
fn each_wrong_has_its_own_error() {
    let sealed = sample();
    assert_eq!(open(&key_file(9), "token", &sealed).unwrap_err(), Error::OtherKey);
    assert_eq!(
        open(&key_file(1), "subscription", &sealed).unwrap_err(),
        Error::OtherPurpose
    );
    assert_eq!(
        open(&passphrase("p"), "token", &sealed).unwrap_err(),
        Error::OtherSealing("with a key file")
    );
    let by_passphrase = seal(&passphrase("p"), "token", b"x", [2; 16], [3; 12]).unwrap();
    assert_eq!(
        open(&key_file(1), "token", &by_passphrase).unwrap_err(),
        Error::OtherSealing("with a passphrase")
    );
    assert_eq!(
        open(&passphrase("q"), "token", &by_passphrase).unwrap_err(),
        Error::OtherKey
    );
    assert_eq!(
        open(&key_file(1), "token", b"{\"token\":\"x\"}").unwrap_err(),
        Error::NotSealed
    );
    let mut newer = sealed.clone();
    newer[8] = 2;
    assert_eq!(open(&key_file(1), "token", &newer).unwrap_err(), Error::Newer(2));
    let mut longer = sealed.clone();
    longer.push(0);
    assert_eq!(open(&key_file(1), "token", &longer).unwrap_err(), Error::Damaged);
    let large = vec![0; MAX_PLAINTEXT_BYTES + 1];
    assert_eq!(
        seal(&key_file(1), "token", &large, [2; 16], [3; 12]).unwrap_err(),
        Error::TooLarge
    );
}

#[test]
fn every_truncation_says_so() {
    let sealed = sample();
    for length in 0..sealed.len() {
        assert_eq!(
            open(&key_file(1), "token", &sealed[..length]).unwrap_err(),
            Error::Truncated,
            "{length}"
        );
    }
}

#[test]
fn every_flipped_bit_is_refused_and_with_a_mended_digest_still() {
    let sealed = sample();
    let key = Key::derive(&key_file(1), [2; 16]).unwrap();
    for bit in 0..sealed.len() * 8 {
        let mut bad = sealed.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(key.open("token", &bad).is_err(), "bit {bit}");
        if bit / 8 < sealed.len() - DIGEST_BYTES {
            let error = key.open("token", &resum(bad)).unwrap_err();
            let body = sealed.len() - DIGEST_BYTES - TAG_BYTES - b"secret token".len();
            if bit / 8 >= body {
                assert_eq!(error, Error::Tampered, "bit {bit}");
            }
        }
    }
}

proptest! {
    #[test]
    fn any_small_plaintext_survives(plaintext in proptest::collection::vec(any::<u8>(), 0..500), purpose in "[a-z]{0,20}") {
        let sealed = seal(&key_file(1), &purpose, &plaintext, [2; 16], [3; 12]).unwrap();
        let opened = open(&key_file(1), &purpose, &sealed).unwrap();
        prop_assert_eq!(opened.as_slice(), plaintext.as_slice());
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut record = MAGIC.to_vec();
        record.push(VERSION);
        record.extend_from_slice(&bytes);
        prop_assert!(salt_of(&record).is_err());
    }
}
