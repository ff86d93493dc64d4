//! Sealed records: whole, ours, or refused.
