//! The DVPN pool server.

mod operator;

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser as _};
use dvpn_common::ids::ProviderId;
use dvpn_pool::{
    Config,
    cli::{Cli, Command, Options, with_causes},
    store::Store,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// sysexits.h: something is wrong with the configuration, and a restart does not help.
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("DVPN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("the async runtime does not start: {error}"), 1),
    };
    match (cli.check_config, cli.command) {
        (true, _) => match cli.options.config() {
            Ok(_) => say("the configuration is good"),
            Err(wrong) => fail(&wrong.join("\n"), EX_CONFIG),
        },
        (false, Some(Command::Serve)) => match cli.options.config() {
            Ok(config) => runtime.block_on(serve(config)),
            Err(wrong) => fail(&wrong.join("\n"), EX_CONFIG),
        },
        (false, Some(Command::Nodes)) => runtime.block_on(nodes(cli.options)),
        (false, Some(Command::ApproveNode { id })) => runtime.block_on(set_approved(cli.options, id, true)),
        (false, Some(Command::RevokeNode { id })) => runtime.block_on(set_approved(cli.options, id, false)),
        (false, Some(Command::StandbyNode { id, off })) => {
            runtime.block_on(operator::set_standby(cli.options, id, !off))
        }
        (false, Some(Command::Revoke(which))) => runtime.block_on(operator::revoke(cli.options, which)),
        (false, Some(Command::RotateKey)) => runtime.block_on(operator::rotate_key(cli.options)),
        (false, None) => fail(&Cli::command().render_help().to_string(), 2),
    }
}

async fn serve(config: Config) -> ExitCode {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return fail("signals cannot be received", 1);
    };
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    tracing::warn!(
        "DEVELOPMENT POOL: no coins are taken, anybody may mark a checkout as paid, and its dev_ tokens are refused by \
         clients unless DVPN_DEVELOPMENT=true"
    );
    if config.open_registration {
        tracing::warn!(
            "open registration: any node that answers an echo and a handshake at the address it registers from is listed"
        );
    }
    let server = match dvpn_pool::serve(config, shutdown).await {
        Ok(server) => server,
        Err(error) => return fail(&with_causes(&error), 1),
    };
    tracing::info!(pool_key = %server.pool_key(), "listening on https://{}", server.address());
    match server.finished().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&with_causes(&error), 1),
    }
}

async fn nodes(options: Options) -> ExitCode {
    let nodes = match database(options) {
        Ok(path) => match Store::open(&path).await {
            Ok(store) => match store.standbys().await {
                Ok(standbys) => store.nodes().await.map(|nodes| (nodes, standbys)),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        },
        Err(code) => return code,
    };
    match nodes {
        Ok((nodes, standbys)) => {
            let lines: Vec<String> = nodes
                .iter()
                .map(|node| {
                    let approved = match (standbys.contains(&node.id), node.approved) {
                        (true, _) => "standby",
                        (false, true) => "approved",
                        (false, false) => "waiting",
                    };
                    format!("{}\t{approved}\t{}\t{}", node.id, node.endpoint, node.public_key)
                })
                .collect();
            say(&lines.join("\n"))
        }
        Err(error) => fail(&with_causes(&error), 1),
    }
}

async fn set_approved(options: Options, id: ProviderId, approved: bool) -> ExitCode {
    let done = match database(options) {
        Ok(path) => match Store::open(&path).await {
            Ok(store) => store.set_approved(&id, approved).await,
            Err(error) => Err(error),
        },
        Err(code) => return code,
    };
    match done {
        Ok(true) => say("done: the running pool follows at the node's next heartbeat"),
        Ok(false) => fail(&format!("there is no node {id}"), 1),
        Err(error) => fail(&with_causes(&error), 1),
    }
}

/// The database of the commands that work beside a running pool: it must exist.
fn database(options: Options) -> Result<PathBuf, ExitCode> {
    match options.database {
        Some(path) if path.exists() => Ok(path),
        Some(path) => Err(fail(&format!("there is no database {}", path.display()), EX_CONFIG)),
        None => Err(fail("--database (or DVPN_POOL_DATABASE) is missing", EX_CONFIG)),
    }
}

fn say(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(text: &str, code: u8) -> ExitCode {
    // Where standard error is gone there is nobody left to tell.
    drop(writeln!(std::io::stderr(), "dvpn-pool: {text}"));
    ExitCode::from(code)
}
