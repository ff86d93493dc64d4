//! Identifiers: short printable names, checked once where they enter.

use std::{fmt, str::FromStr};

/// Longest identifier, in bytes.
pub const MAX_ID_BYTES: usize = 64;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Empty or longer than [`MAX_ID_BYTES`].
    #[error("an identifier has 1 to {MAX_ID_BYTES} characters, this one has {0}")]
    Length(usize),
    /// A character outside `A–Z a–z 0–9 . _ : -`.
    #[error("an identifier holds only letters, digits and . _ : -, this one holds {0:?}")]
    Character(char),
}

fn check(text: &str) -> Result<(), Error> {
    if text.is_empty() || text.len() > MAX_ID_BYTES {
        return Err(Error::Length(text.len()));
    }
    match text
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-')))
    {
        Some(c) => Err(Error::Character(c)),
        None => Ok(()),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                check(text).map(|()| Self(text.to_owned()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                check(&text).map(|()| Self(text))
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A provider as the pool lists it; the `NODE_ID` of that install.
    ProviderId
);
id!(
    /// Where a provider stands, as the pool names it (`eu-west`, `de`).
    Region
);
id!(
    /// The random number that stands for a customer at checkout; never the node's identity.
    UserId
);
id!(
    /// One checkout at the payment server.
    CheckoutId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_short_and_printable() {
        assert!("provider-a".parse::<ProviderId>().is_ok());
        assert_eq!("".parse::<ProviderId>(), Err(Error::Length(0)));
        assert_eq!("a".repeat(65).parse::<ProviderId>(), Err(Error::Length(65)));
        assert_eq!("a\nb".parse::<ProviderId>(), Err(Error::Character('\n')));
        assert!(serde_json::from_str::<ProviderId>("\"a b\"").is_err());
    }
}
