//! `conclave placement drain W`: an order in the store that a worker move its experts away and end, and a wait until it
//! has. The worker does the work, and takes the order out when it leaves.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, ensure};
use conclave_placement::state::DrainOrder;
use conclave_placement::view::View;
use conclave_placement::{ClusterState, Incarnation, WorkerId, planner};
use tokio_util::sync::CancellationToken;

use super::place::{Found, Where};
use crate::terminal;

/// Make a worker move its experts away, then leave.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave placement drain worker-3
  conclave placement drain worker-3 --no-wait
  conclave placement drain worker-3 --cancel")]
pub(crate) struct Args {
    /// The worker's name.
    #[arg(value_name = "WORKER")]
    worker: WorkerId,
    #[command(flatten)]
    place: Where,
    /// How long to wait for it to leave, seconds. The order stands after that, too.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Give the order and do not wait.
    #[arg(long)]
    no_wait: bool,
    /// Take back an order that the worker has not seen, as one for a worker that has ended.
    #[arg(long, conflicts_with_all = ["no_wait", "timeout"])]
    cancel: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { store, keys, state, .. } = args.place.find().await?;
    let worker = args.worker;
    if args.cancel {
        ensure!(store.delete(&keys.drain(&worker)).await?, "there is no order for {worker}");
        return Ok(ExitCode::SUCCESS);
    }
    let Some(record) = state.workers.get(&worker) else {
        let names: Vec<&str> = state.workers.keys().map(WorkerId::as_str).collect();
        bail!("there is no worker {worker}; there are: {}", names.join(", "));
    };
    let incarnation = record.incarnation;
    let others = state.workers.values().filter(|other| other.id != worker && !state.is_leaving(other)).count();
    ensure!(others > 0, "{worker} is the only worker that stays: its experts would have nowhere to go");
    let homeless = homeless(&state, &worker);
    ensure!(
        homeless == 0,
        "without {worker} there would be no room for {homeless} of the experts: add a worker, or memory"
    );
    store.put(&keys.drain(&worker), DrainOrder { incarnation }.encode(), None).await?;
    if args.no_wait {
        return Ok(ExitCode::SUCCESS);
    }

    let token = CancellationToken::new();
    let _ended = token.clone().drop_guard();
    let view = View::start(store, keys, token).await?;
    let mut changes = view.subscribe();
    let gone = async {
        let mut told = String::new();
        loop {
            let line = match left(&changes.borrow_and_update(), &worker, incarnation) {
                None => return anyhow::Ok(()),
                Some(left) => left,
            };
            if line != told {
                terminal::warn(&line);
                told = line;
            }
            changes.changed().await?;
        }
    };
    match tokio::time::timeout(Duration::from_secs(args.timeout), gone).await {
        Ok(gone) => gone?,
        Err(_) => bail!("{worker} has not left within {} s; the order stands", args.timeout),
    }
    terminal::warn(&format!("{worker} has left"));
    Ok(ExitCode::SUCCESS)
}

/// Experts that would be nobody's without that worker, for want of memory elsewhere.
fn homeless(state: &ClusterState, worker: &WorkerId) -> usize {
    let Some(model) = &state.model else { return 0 };
    // A worker can hold each expert once, and what it holds now it can let go of: one of each is all that must have room.
    let workers = planner::candidates(state).into_iter().filter(|other| other.id != *worker);
    let rooms = workers.map(|other| other.room(model)).fold(0, usize::saturating_add);
    let experts = model.moe_layers.len() * model.experts as usize;
    experts.saturating_sub(rooms)
}

/// What is still to be done before that run of the worker is gone; `None` when it is.
fn left(state: &Arc<ClusterState>, worker: &WorkerId, incarnation: Incarnation) -> Option<String> {
    let record = state.workers.get(worker).filter(|record| record.incarnation == incarnation)?;
    let elsewhere = |id: &WorkerId| id != worker && state.workers.get(id).is_some_and(|other| !state.is_leaving(other));
    let alone = record
        .resident
        .iter()
        .filter(|(layer, expert)| !state.holders(*layer, *expert).any(|holder| elsewhere(&holder.id)));
    Some(match alone.count() {
        0 => format!("{worker} is leaving: others hold all of its {} experts", record.resident.len()),
        alone => format!("{worker} is leaving: {alone} of its {} experts are nowhere else yet", record.resident.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::ready::tests::state;

    #[test]
    fn a_worker_stays_where_its_experts_would_have_no_room() {
        let mut state = state(2, &[&[0], &[1], &[0, 1]]);
        let [gone, other] = ["worker-0", "worker-1"].map(|name| WorkerId::parse(name).unwrap());
        assert_eq!(homeless(&state, &gone), 0, "memory without a limit");
        state.workers.get_mut(&other).unwrap().memory_budget = 2 << 20;
        assert_eq!(homeless(&state, &gone), 1);
    }

    #[test]
    fn what_is_left_to_do_is_told_until_the_worker_is_gone() {
        let mut state = state(2, &[&[0], &[1], &[0, 1]]);
        let worker = WorkerId::parse("worker-0").unwrap();
        let incarnation = state.workers[&worker].incarnation;
        let said = |state: &ClusterState| left(&Arc::new(state.clone()), &worker, incarnation);
        assert_eq!(said(&state).unwrap(), "worker-0 is leaving: 1 of its 2 experts are nowhere else yet");
        let held = state.workers[&worker].resident.clone();
        for (layer, expert) in held.iter() {
            state.workers.get_mut(&WorkerId::parse("worker-1").unwrap()).unwrap().resident.insert(layer, expert);
        }
        assert_eq!(said(&state).unwrap(), "worker-0 is leaving: others hold all of its 2 experts");
        state.workers.get_mut(&worker).unwrap().incarnation = Incarnation::fresh();
        assert_eq!(said(&state), None, "a later run of it may stay");
    }
}
