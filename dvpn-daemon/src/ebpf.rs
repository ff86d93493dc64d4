//! The tc programs: load, attach, pin, read.
