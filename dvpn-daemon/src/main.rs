//! The DVPN system service.

use std::{path::Path, process::ExitCode};

use dvpn_daemon::{
    node, run,
    settings::{Arguments, DEFAULT_BPF_DIRECTORY, DEFAULT_STATE_DIRECTORY, Task},
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
        // What is left on the machine goes whatever the configuration has become.
        Err(error) if arguments.task == Task::Cleanup => {
            run::refuse(&error);
            return run::cleanup(Path::new(DEFAULT_BPF_DIRECTORY), Path::new(DEFAULT_STATE_DIRECTORY));
        }
        Err(error) => return run::refuse(&error),
    };
    match arguments.task {
        Task::Run | Task::Simulate { .. } => run::serve(arguments, config, node::device()),
        Task::CheckConfig => run::check_config(&config),
        Task::Cleanup => run::cleanup(&config.bpf_directory, &config.state_directory),
        Task::EarlyBoot => run::early_boot(&config),
    }
}
