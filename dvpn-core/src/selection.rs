//! Which providers are measured, and which is taken.
