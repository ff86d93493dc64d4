//! Where values come from.

use std::collections::BTreeMap;

use super::{
    Error, Secret,
    table::{SETTINGS, Setting},
};
use crate::text::excerpt;

/// Values from one place, by environment name; the place's name is in every error about them.
#[derive(Clone)]
pub struct Source {
    /// `command line`, `environment`, a file's path.
    pub origin: String,
    /// The values as text. Empty text is no value.
    pub values: BTreeMap<String, Secret>,
}

impl Source {
    /// A source with nothing in it.
    pub fn new(origin: impl Into<String>) -> Self {
        Self {
            origin: origin.into(),
            values: BTreeMap::new(),
        }
    }

    /// Adds one value.
    pub fn insert(&mut self, name: impl Into<String>, value: Secret) {
        self.values.insert(name.into(), value);
    }

    /// The environment: what is no setting of ours is somebody else's and ignored.
    pub fn environment(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut source = Self::new("environment");
        for (name, value) in variables {
            let known = |setting: &Setting| setting.name == name || setting.file_name().as_ref() == Some(&name);
            if SETTINGS.iter().any(known) {
                source.insert(name, Secret::new(value));
            }
        }
        source
    }

    /// A TOML file: flat, keys are the lower-case names. Unknown keys and secrets are errors, all reported.
    pub fn toml(origin: &str, text: &str) -> Result<Self, Vec<Error>> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            // Neither message nor context of the parser's error: both quote the file.
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |head| head.lines().count().max(1));
            vec![Error::Syntax {
                origin: origin.to_owned(),
                line,
            }]
        })?;
        let mut source = Self::new(origin);
        let mut errors = Vec::new();
        for (key, value) in table {
            let unknown = || Error::UnknownKey {
                origin: origin.to_owned(),
                key: excerpt(&key),
            };
            let file_key = |s: &&Setting| s.file_name().is_some_and(|name| name.to_ascii_lowercase() == key);
            if let Some(setting) = SETTINGS.iter().find(|setting| setting.toml_key() == key) {
                if setting.secret {
                    errors.push(Error::SecretInFile {
                        origin: origin.to_owned(),
                        key,
                    });
                } else if let Some(text) = plain(&value) {
                    source.insert(setting.name, Secret::new(text));
                } else {
                    errors.push(Error::NotPlain {
                        origin: origin.to_owned(),
                        key,
                    });
                }
            } else if let Some(setting) = SETTINGS.iter().find(file_key) {
                match (setting.file_name(), plain(&value)) {
                    (Some(name), Some(text)) => source.insert(name, Secret::new(text)),
                    (Some(_) | None, _) => errors.push(Error::NotPlain {
                        origin: origin.to_owned(),
                        key,
                    }),
                }
            } else {
                errors.push(unknown());
            }
        }
        if errors.is_empty() { Ok(source) } else { Err(errors) }
    }
}

/// A TOML value as the environment would hold it; a list becomes comma-separated.
fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(items) => {
            let items = items.iter().map(|item| match item {
                toml::Value::String(text) => Some(text.clone()),
                toml::Value::Integer(number) => Some(number.to_string()),
                toml::Value::Float(_)
                | toml::Value::Boolean(_)
                | toml::Value::Datetime(_)
                | toml::Value::Array(_)
                | toml::Value::Table(_) => None,
            });
            Some(items.collect::<Option<Vec<_>>>()?.join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}
