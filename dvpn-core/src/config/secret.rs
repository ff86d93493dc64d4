//! Text that is never shown.

use zeroize::Zeroizing;

/// A secret from the configuration: no Debug, no Display, wiped when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the secret as it was given, without the newline that editors and `echo` put behind it.
    pub fn new(text: impl Into<String>) -> Self {
        let whole = Zeroizing::new(text.into());
        Self(Zeroizing::new(whole.trim_end_matches(['\r', '\n']).to_owned()))
    }
    /// The text: only for where it must go.
    pub fn expose(&self) -> &str {
        &self.0
    }
}
