//! The local network that the system tests and `one-click.sh` run in.
