//! The pool's event stream. The first byte cuts the rest into chunks, and where they are cut changes nothing.
#![no_main]
#![allow(dead_code, reason = "the file is the daemon's")]

#[path = "../../../dvpn-daemon/src/provider/events.rs"]
mod events;

use events::{Decoder, PoolEvent};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};

fn reads_again<T: Serialize + DeserializeOwned + PartialEq>(value: &T) -> bool {
    let text = serde_json::to_string(value).expect("what was read can be written");
    serde_json::from_str::<T>(&text).is_ok_and(|again| again == *value)
}

/// Everything up to the first error, errors as their text.
fn read<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> Vec<Result<(String, PoolEvent), String>> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    for chunk in chunks {
        found.extend(
            decoder
                .read(chunk)
                .into_iter()
                .map(|event| event.map_err(|error| error.to_string())),
        );
        if found.last().is_some_and(Result::is_err) {
            break;
        }
    }
    found
}

fuzz_target!(|data: &[u8]| {
    let Some((first, stream)) = data.split_first() else {
        return;
    };
    let whole = read([stream].into_iter());
    assert_eq!(whole, read(stream.chunks(usize::from(*first).max(1))));
    assert_eq!(whole, read(stream.chunks(1)));
    let errors = whole.iter().filter(|event| event.is_err()).count();
    assert!(
        errors == 0 || errors == 1 && whole.last().is_some_and(Result::is_err),
        "nothing follows an error"
    );
    for (id, event) in whole.iter().flatten() {
        // It goes into a header.
        assert!(id.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(match event {
            PoolEvent::Snapshot(snapshot) => reads_again(snapshot),
            PoolEvent::Added(added) => reads_again(added),
            PoolEvent::Removed(removed) => reads_again(removed),
            PoolEvent::Released(released) => reads_again(released),
        });
    }
});
