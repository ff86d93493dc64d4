//! A provider list: whatever is believed holds every rule.
#![no_main]

use std::collections::BTreeSet;

use dvpn_common::limits::MAX_ALLOWED_IPS;
use dvpn_core::{
    address::{is_global_unicast, is_unicast},
    directory::{Policy, parse, trust::PoolRecord},
};
use dvpn_fuzz::{key, now};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let own = [key(9)];
    for private_endpoints in [false, true] {
        let policy = Policy { own_keys: &own, own_node: None, private_endpoints };
        let Ok(directory) = parse(data, &policy, &PoolRecord::default(), now()) else { continue };
        assert!(directory.expires_at.is_none_or(|end| end > now()));
        let (mut ids, mut keys) = (BTreeSet::new(), BTreeSet::new());
        for provider in &directory.providers {
            assert!(ids.insert(provider.id.as_str()) && keys.insert(provider.public_key));
            assert!(!own.contains(&provider.public_key) && provider.endpoint.port() > 0);
            assert!(is_unicast(provider.endpoint.ip()));
            assert!(private_endpoints || is_global_unicast(provider.endpoint.ip()));
            assert!(provider.probe.is_none_or(|probe| probe.ip() == provider.endpoint.ip() && probe.port() > 0));
            assert!((1..=MAX_ALLOWED_IPS).contains(&provider.allowed_ips.len()));
        }
    }
});
