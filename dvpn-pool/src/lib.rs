//! The reference pool: list, approvals, payments, orchestrator.
