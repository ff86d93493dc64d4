//! The driver: wait, feed the session machine, act, publish.
