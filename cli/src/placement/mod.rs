//! `conclave placement`: what a cluster's placement is, was, and should be. A subcommand comes in, one of the modules
//! below does it against the store. Only `apply` and `drain` write, a plan by compare-and-swap and an order.

mod place;
mod file;
mod load;
mod show;
mod plan;
mod lint;
mod apply;
mod history;
mod drain;

use std::process::ExitCode;

/// What is placed where, and what should be.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Show(show::Args),
    Plan(plan::Args),
    Lint(lint::Args),
    Apply(apply::Args),
    History(history::Args),
    Drain(drain::Args),
}

pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Show(args) => show::run(args).await,
        Command::Plan(args) => plan::run(args).await,
        Command::Lint(args) => lint::run(args).await,
        Command::Apply(args) => apply::run(args).await,
        Command::History(args) => history::run(args).await,
        Command::Drain(args) => drain::run(args).await,
    }
}
