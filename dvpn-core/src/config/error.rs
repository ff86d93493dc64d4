//! Everything wrong with a configuration, at once.

use std::fmt;

/// One thing wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A value that is not what the setting takes. Values of secrets are not shown.
    #[error("{name} ({origin}){}: {reason}", shown(.value.as_deref()))]
    Value {
        /// Which setting.
        name: &'static str,
        /// Where the value came from.
        origin: String,
        /// The value, shortened; nothing for a secret.
        value: Option<String>,
        /// What it must be.
        reason: String,
    },
    /// Two settings that do not go together.
    #[error("{name}: {reason}")]
    Together {
        /// Which setting to change.
        name: &'static str,
        /// Why, and to what.
        reason: &'static str,
    },
    /// A key that no setting has.
    #[error("{origin}: unknown key {key}: see dvpn-daemon --help for the settings")]
    UnknownKey {
        /// The file.
        origin: String,
        /// The key, shortened.
        key: String,
    },
    /// A secret written into a configuration file.
    #[error("{origin}: {key} is a secret: put it in a file of mode 0600 and set {key}_file to its path")]
    SecretInFile {
        /// The file.
        origin: String,
        /// The key.
        key: String,
    },
    /// A table, a date or a nested list.
    #[error("{origin}: {key} must be a text, a number, true, false or a list of texts")]
    NotPlain {
        /// The file.
        origin: String,
        /// The key.
        key: String,
    },
    /// Not TOML.
    #[error("{origin}: line {line} is not TOML")]
    Syntax {
        /// The file.
        origin: String,
        /// From 1.
        line: usize,
    },
}

fn shown(value: Option<&str>) -> String {
    value.map_or_else(String::new, |value| format!(" = \"{value}\""))
}

/// All that is wrong, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<Error>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}
