//! The bytes of an approval: what decodes encodes to the same bytes or at least to the same fields.
#![no_main]

use dvpn_common::approval::ApprovalFields;
use dvpn_fuzz::now;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(fields) = ApprovalFields::decode(data) {
        drop(fields.check_time(now()));
        assert_eq!(ApprovalFields::decode(&fields.encode()).as_ref(), Ok(&fields));
    }
});
