//! What the pool signs of its list: the same before and after the list is written again, and another for another list.
#![no_main]

use dvpn_common::{
    contract::{KeyRotation, ProviderEntry, ProviderList},
    directory::{rotation_bytes, signed_bytes},
};
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

struct Signed {
    version: u64,
    expires_at: Timestamp,
    providers: Vec<ProviderEntry>,
    rotations: Vec<KeyRotation>,
}

impl Signed {
    fn bytes(&self) -> Vec<u8> {
        signed_bytes(self.version, self.expires_at, &self.providers)
    }
}

fn read(data: &[u8]) -> Option<Signed> {
    let ProviderList::Object {
        providers,
        version,
        expires_at,
        rotations,
        ..
    } = serde_json::from_slice(data).ok()?
    else {
        return None;
    };
    Some(Signed {
        version: version?,
        expires_at: expires_at?,
        providers,
        rotations,
    })
}

fuzz_target!(|data: &[u8]| {
    let Some(mut list) = read(data) else { return };
    let bytes = list.bytes();
    let again: ProviderList = serde_json::from_slice(data).expect("it was read before");
    let again = read(&serde_json::to_vec(&again).expect("what was read can be written")).expect("and read");
    assert_eq!(again.bytes(), bytes);

    for rotation in &list.rotations {
        let signed = rotation_bytes(&rotation.from, &rotation.to);
        assert_ne!(signed, bytes);
        if rotation.from != rotation.to {
            assert_ne!(signed, rotation_bytes(&rotation.to, &rotation.from));
        }
    }

    list.version ^= 1;
    assert_ne!(list.bytes(), bytes);
    list.version ^= 1;
    if list.providers.first().map(|first| &first.id) != list.providers.last().map(|last| &last.id) {
        list.providers.reverse();
        assert_ne!(list.bytes(), bytes);
        list.providers.reverse();
    }
    if let Some(last) = list.providers.last_mut() {
        // A letter that moves from one field to the next moves in the signed bytes as well.
        if let Some(letter) = last.id.pop() {
            last.endpoint.insert(0, letter);
            assert_ne!(list.bytes(), bytes);
        }
        list.providers.pop();
        assert_ne!(list.bytes(), bytes);
    }
});
