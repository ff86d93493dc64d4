//! Latency of candidates.
