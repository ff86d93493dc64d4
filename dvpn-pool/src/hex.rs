//! Hexadecimal text of fixed sizes: nonces, tokens, identifiers.

/// Two lower-case digits a byte.
pub fn encode(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 0xf])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// Exactly `N` bytes, digits of either case.
pub fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |at: usize| pair.get(at).and_then(|c| char::from(*c).to_digit(16));
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_hexadecimal_reads() {
        assert_eq!(decode::<2>(&encode(&[0x0a, 0xff])), Some([0x0a, 0xff]));
        assert_eq!(decode::<2>("0AfF"), Some([0x0a, 0xff]));
        for bad in ["", "0aff0", "0af", "0aff00", "+aff", "0ag0", "0a é"] {
            assert_eq!(decode::<2>(bad), None, "{bad}");
        }
    }
}
