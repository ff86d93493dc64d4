//! Every HTTP body that a peer sends: what reads is written and reads again as the same.
#![no_main]

use dvpn_common::contract::{
    Ack, ApproveRequest, ApproveResponse, ChallengeResponse, CheckoutRequest, CheckoutResponse, CheckoutStatus,
    ErrorBody, PeerAdded, PeerReleased, PeerRemoved, ProviderList, ProvisionRequest, ProvisionResponse,
    RegisterRequest, RegisterResponse, ReleaseRequest, Snapshot, VerifyRequest,
};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};

fn check<T: Serialize + DeserializeOwned>(data: &[u8]) {
    check_with(data, |_body: &mut T| ());
}

/// `settle` makes equal what need not come back bit by bit.
fn check_with<T: Serialize + DeserializeOwned>(data: &[u8], settle: impl Fn(&mut T)) {
    let Ok(mut first) = serde_json::from_slice::<T>(data) else {
        return;
    };
    settle(&mut first);
    let written = serde_json::to_vec(&first).expect("what was read can be written");
    let mut second: T = serde_json::from_slice(&written).expect("what was written can be read");
    settle(&mut second);
    // Every field is in the text, and not every body may be printed or compared.
    assert_eq!(written, serde_json::to_vec(&second).expect("again"));
}

/// A number may come back as its neighbour.
fn settle_price(price: &mut f64) {
    assert!(price.is_finite());
    *price = 9.99;
}

fuzz_target!(|data: &[u8]| {
    // What the pool, the payment server and the orchestrator read.
    check_with(data, |body: &mut VerifyRequest| {
        settle_price(&mut body.required_price_usd)
    });
    check_with(data, |body: &mut CheckoutRequest| {
        settle_price(&mut body.required_price_usd)
    });
    check::<ApproveRequest>(data);
    check::<ReleaseRequest>(data);
    check::<RegisterRequest>(data);
    check::<Ack>(data);
    check::<ProvisionRequest>(data);
    // What nodes read.
    check::<ProviderList>(data);
    check::<CheckoutResponse>(data);
    check::<CheckoutStatus>(data);
    check::<ChallengeResponse>(data);
    check::<ApproveResponse>(data);
    check::<RegisterResponse>(data);
    check::<ProvisionResponse>(data);
    check::<ErrorBody>(data);
    check::<Snapshot>(data);
    check::<PeerAdded>(data);
    check::<PeerRemoved>(data);
    check::<PeerReleased>(data);
});
