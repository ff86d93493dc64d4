//! The log: a line each on standard error or the journal, and a short tail in memory for the D-Bus method `Logs`.
