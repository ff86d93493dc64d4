//! What of somebody else's text may stand in a message of ours: short and printable.

/// Longest excerpt, in characters.
const MAX_EXCERPT_CHARS: usize = 80;

/// At most 80 printable characters of `text`; anything else becomes `·`, and a cut is shown as `…`.
pub fn excerpt(text: &str) -> String {
    let mut chars = text.trim().chars();
    let mut out: String = chars
        .by_ref()
        .take(MAX_EXCERPT_CHARS)
        // Controls, bidirectional overrides and the like could rewrite a terminal line; letters of any script may pass.
        .map(|c| {
            if c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric() {
                c
            } else {
                '·'
            }
        })
        .collect();
    if chars.next().is_some() {
        out.push('…');
    }
    out
}

/// [`excerpt`] of bytes that may not be UTF-8.
pub fn excerpt_bytes(bytes: &[u8]) -> String {
    excerpt(&String::from_utf8_lossy(
        bytes.get(..4 * MAX_EXCERPT_CHARS).unwrap_or(bytes),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(excerpt("plain text"), "plain text");
        assert_eq!(excerpt("a\x1b[31m\nb\u{202e}c"), "a·[31m·b·c");
        assert_eq!(excerpt(&"x".repeat(1000)).chars().count(), MAX_EXCERPT_CHARS + 1);
        assert!(excerpt_bytes(&[0xff; 5000]).chars().count() <= MAX_EXCERPT_CHARS + 1);
    }
}
