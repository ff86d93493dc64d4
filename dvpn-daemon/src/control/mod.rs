//! Control: one set of commands and one status, served over D-Bus and HTTP.
