//! The orchestrator's answer.
#![no_main]

use dvpn_core::{
    address::is_global_unicast,
    approval::{Approval, ProvisionRequest},
    directory::Policy,
};
use dvpn_fuzz::{key, now, subscription};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let request = ProvisionRequest {
        subscription: &subscription(),
        client_key: &key(2),
        policy: &Policy::default(),
        static_addresses: &["10.8.0.2/32".parse().expect("a prefix")],
        now: now(),
    };
    if let Ok(approval) = Approval::from_provision(&request, data) {
        let provider = approval.provider();
        assert!(is_global_unicast(provider.endpoint.ip()) && provider.endpoint.port() > 0);
        assert!(provider.public_key != key(2) && !provider.allowed_ips.is_empty());
    }
});
