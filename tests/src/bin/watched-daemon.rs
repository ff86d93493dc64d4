//! `dvpn-daemon` with a window onto its provider's tunnel (`dvpn_tests::window`), for tests that must know what the
//! device has. Everything else is the daemon's own.

use std::process::ExitCode;

use dvpn_daemon::{run, settings::Arguments};
use dvpn_tests::window;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(asked) => return run::usage(&asked),
    };
    let config = match arguments.load(std::env::vars_os()) {
        Ok(config) => config,
        Err(error) => return run::refuse(&error),
    };
    let Some(socket) = std::env::var_os(window::VARIABLE) else {
        return run::complain(&format!("set {}", window::VARIABLE));
    };
    run::serve(arguments, config, window::device(socket.into()))
}
