//! The audit stream: JSON lines with a sequence number, never filtered by log levels.
