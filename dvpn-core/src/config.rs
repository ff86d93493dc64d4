//! What the operator asked for: one table of settings.
