//! The DVPN system service.

use std::process::ExitCode;

use dvpn_daemon::{
    run,
    settings::{Arguments, Task},
};

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(asked) => return run::usage(&asked),
    };
    if let Task::Simulate { seeds } = arguments.task {
        return run::simulate(seeds);
    }
    let config = match arguments.load(std::env::vars_os()) {
        Ok(config) => config,
        Err(error) => return run::refuse(&error),
    };
    match arguments.task {
        Task::Run | Task::Simulate { .. } => run::serve(arguments, config),
        Task::CheckConfig => run::print("the configuration is good"),
        Task::Cleanup => run::cleanup(&config),
    }
}
