//! The HTTP handlers, one module a service.

pub mod approve;
pub mod nodes;
pub mod payment;
pub mod providers;
pub mod provision;
pub mod release;
pub mod speed;
