//! The session machine.

mod io;

pub use io::{Action, Attempt, Choice, Input, Measurement, SessionConfig, Traffic};
