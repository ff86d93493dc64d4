//! Settings: the command line, the environment, credentials and files become one [`Config`].
//!
//! Command line > environment > `dvpn.toml` and its `conf.d` > defaults. A secret comes from
//! `$CREDENTIALS_DIRECTORY/NAME`, else from the file that `NAME_FILE` names, else from `NAME` in the environment; never
//! from the command line, which every user of the machine can read.

mod files;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use dvpn_core::config::{self, Config, Kind, SETTINGS, Source};

use crate::fallback::Script;

/// Exit status of a process whose configuration is wrong: `EX_CONFIG` of sysexits.h.
pub const EXIT_CONFIG: u8 = 78;
/// The file read unless `--config` names another; missing, it counts as empty.
pub const DEFAULT_FILE: &str = "/etc/dvpn/dvpn.toml";
/// Where pins are when no configuration says otherwise.
pub const DEFAULT_BPF_DIRECTORY: &str = "/sys/fs/bpf/dvpn";
/// What survives a restart is there when no configuration says otherwise.
pub const DEFAULT_STATE_DIRECTORY: &str = "/var/lib/dvpn";
/// Simulated sessions of `--simulate` without a number.
pub const DEFAULT_SEEDS: u64 = 1000;

/// What the process is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Serve.
    Run,
    /// Read the configuration, say whether it is good, leave.
    CheckConfig,
    /// Take away everything of ours from this machine's network, leave.
    Cleanup,
    /// Block, if a session is wanted and blocks; leave. For the time before there is a network.
    EarlyBoot,
    /// Play this many simulated sessions, leave.
    Simulate {
        /// How many.
        seeds: u64,
    },
}

/// The command line, read.
#[derive(Clone)]
pub struct Arguments {
    /// What to do.
    pub task: Task,
    file: Option<PathBuf>,
    source: Source,
}

/// Why there is no configuration. Its text lists every problem; the process exits with [`EXIT_CONFIG`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory does not read.
    #[error("reading {path}: check that it exists and that the daemon's user may read it")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A secret that others than owner and group can read.
    #[error(
        "{path} holds a secret and has mode {mode:03o}: others may have read it; chmod 600 it and replace the secret"
    )]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a text file of sensible size.
    #[error("{path} is not a text of at most 64 KiB")]
    NotText {
        /// Which.
        path: PathBuf,
    },
    /// An environment variable of ours that is not UTF-8.
    #[error("the environment variable {name} is not UTF-8")]
    Environment {
        /// Which.
        name: String,
    },
    /// A fallback script that is not to be run.
    #[error("{}", crate::run::chain(.0))]
    Script(crate::fallback::Untrusted),
    /// Values that are refused, all of them.
    #[error(transparent)]
    Values(#[from] config::Errors),
    /// Several of these at once.
    #[error("{}", lines(.0))]
    Many(Vec<Error>),
}

fn lines(errors: &[Error]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The command line as clap sees it: every setting that is no secret, and what the process can do.
pub fn command() -> Command {
    let task = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .action(ArgAction::SetTrue)
            .group("task")
            .help(help)
    };
    let mut command = Command::new("dvpn-daemon")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The DVPN system service")
        .after_help(
            "Every option is also an environment variable (--pool-url is POOL_URL) and a key in dvpn.toml (pool_url).\n\
             Secrets are none: give NAME_FILE (a file of mode 0600) or a systemd credential.",
        )
        .arg(task(
            "check-config",
            "Read the configuration, report every error, exit (78 if there is one)",
        ))
        .arg(task(
            "cleanup",
            "Remove everything of DVPN from this machine's network (opens a kill switch), exit",
        ))
        .arg(task(
            "early-boot",
            "In device mode: block now what the service will block when it starts, exit; before the network is up",
        ))
        .arg(
            Arg::new("simulate")
                .long("simulate")
                .value_name("SEEDS")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value(DEFAULT_SEEDS.to_string())
                .value_parser(value_parser!(u64))
                .group("task")
                .help("Play simulated sessions against the session machine, exit"),
        )
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .help("Read this file, and conf.d/*.toml beside it, instead of /etc/dvpn/dvpn.toml"),
        );
    for setting in SETTINGS {
        let mut arg = Arg::new(setting.name)
            .long(setting.option())
            .value_name(setting.kind.placeholder());
        arg = if setting.secret {
            // Taken only to be refused by name: clap's own message about an unknown option could quote the value.
            arg.hide(true).num_args(0..=1)
        } else if setting.kind == Kind::Flag {
            arg.num_args(0..=1).require_equals(true).default_missing_value("true")
        } else {
            arg.num_args(1)
        };
        let default = if setting.default.is_empty() {
            String::new()
        } else {
            format!(" [{}]", setting.default)
        };
        command = command.arg(
            arg.help(format!("{}{default}", setting.doc))
                .allow_hyphen_values(!setting.secret),
        );
    }
    command
}

impl Arguments {
    /// Reads the command line. The error is clap's: also for `--help` and `--version`, which are to be printed.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut command = command();
        let matches = command.try_get_matches_from_mut(arguments)?;
        let mut source = Source::new("command line");
        for setting in SETTINGS {
            if setting.secret {
                if matches.contains_id(setting.name) {
                    let option = setting.option();
                    let text = format!(
                        "--{option} is not an option: everybody on this machine can read a command line. \
                         Set {}_FILE to a file of mode 0600.",
                        setting.name
                    );
                    return Err(command.error(clap::error::ErrorKind::UnknownArgument, text));
                }
            } else if let Some(value) = matches.get_one::<String>(setting.name) {
                source.insert(setting.name, config::Secret::new(value.as_str()));
            }
        }
        Ok(Self {
            task: task(&matches),
            file: matches.get_one::<PathBuf>("config").cloned(),
            source,
        })
    }

    /// Reads environment and files, now; called again on SIGHUP.
    pub fn load(&self, environment: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Config, Error> {
        let mut errors = Vec::new();
        let (variables, credentials) = read_environment(environment, &mut errors);
        let mut sources = vec![self.source.clone(), Source::environment(variables)];
        match files::configuration(
            self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE)),
            self.file.is_some(),
        ) {
            Ok(found) => sources.extend(found),
            Err(error) => errors.push(error),
        }
        match files::secrets(credentials.as_deref(), &sources) {
            Ok(secrets) => sources.splice(0..0, secrets).for_each(drop),
            Err(error) => errors.push(error),
        }
        let config = config::parse(&sources).map_err(|error| errors.push(error.into()));
        if let Ok(config) = &config
            && config.fallback.enabled
            && let Err(error) = Script::open(&config.fallback.script)
        {
            errors.push(Error::Script(error));
        }
        match (config, errors.pop()) {
            (Ok(config), None) => Ok(config),
            (Ok(_) | Err(()), Some(error)) if errors.is_empty() => Err(error),
            (Ok(_) | Err(()), last) => {
                errors.extend(last);
                Err(Error::Many(errors))
            }
        }
    }
}

fn task(matches: &ArgMatches) -> Task {
    match matches.get_one::<u64>("simulate") {
        Some(&seeds) => Task::Simulate { seeds },
        None if matches.get_flag("check-config") => Task::CheckConfig,
        None if matches.get_flag("cleanup") => Task::Cleanup,
        None if matches.get_flag("early-boot") => Task::EarlyBoot,
        None => Task::Run,
    }
}

/// Our variables as text, and the directory of credentials.
fn read_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    errors: &mut Vec<Error>,
) -> (BTreeMap<String, String>, Option<PathBuf>) {
    let mut variables = BTreeMap::new();
    let mut credentials = None;
    for (name, value) in environment {
        let Ok(name) = name.into_string() else { continue };
        if name == "CREDENTIALS_DIRECTORY" {
            credentials = Some(PathBuf::from(value));
            continue;
        }
        let is_ours = SETTINGS
            .iter()
            .any(|s| s.name == name || s.file_name().as_ref() == Some(&name));
        match value.into_string() {
            Ok(value) if is_ours => {
                variables.insert(name, value);
            }
            Err(_) if is_ours => errors.push(Error::Environment { name }),
            Ok(_) | Err(_) => {}
        }
    }
    (variables, credentials)
}

#[cfg(test)]
mod tests;
