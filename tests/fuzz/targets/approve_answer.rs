//! The pool's answer to an approval request. The first byte chooses the status and whether the pool's key is known.
#![no_main]

use dvpn_core::{
    address::is_private,
    approval::{Approval, PoolRequest},
};
use dvpn_fuzz::{key, now, pool_key, provider, subscription};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (subscription, provider, pool_key) = (subscription(), provider(), pool_key());
    let request = PoolRequest {
        subscription: &subscription,
        provider: &provider,
        client_key: &key(2),
        static_addresses: &[],
        pool_key: None,
        last_serial: None,
        now: now(),
    };
    let with_key = PoolRequest { pool_key: Some(&pool_key), ..request };
    for status in [200, 401, 403, 500, 503] {
        match Approval::from_pool(&request, status, data) {
            Ok(approval) => {
                assert_eq!(status, 200);
                assert!(approval.expires_at() > now() && approval.expires_at() <= subscription.valid_until());
                assert!((1..=2).contains(&approval.addresses().len()));
                assert!(approval.addresses().iter().all(|address| is_private(address.ip())));
                assert!(approval.gateways().iter().all(|gateway| is_private(*gateway)));
                assert_eq!(approval.client_key(), &key(2));
            }
            Err(error) => assert!(!error.to_string().contains(|c: char| c.is_control())),
        }
        // Nobody holds the key, so nothing may pass.
        assert!(Approval::from_pool(&with_key, status, data).is_err());
    }
});
