//! The judge: the promises that plans and settled clusters keep, as functions of what was seen.
//!
//! In: plans, moments of the store, what workers hold. Out: what is wrong, or nothing. Never here: time, or a process.

use std::collections::BTreeMap;

use conclave_placement::{
    ids::{RouterId, WorkerId},
    lint::{Note, Rule, Severity, lint},
    plan::Plan,
    planner::{PlannerWorker, Problem, Rebalance, candidates, redundant_by_default},
    state::{ClusterState, Residency},
};

use crate::scenario::Scenario;

/// What is wrong with a plan that was written after `previous`. It must be right for at least one of the moments that its
/// author may have seen, of which the likeliest comes first.
pub fn faults<'a>(
    scenario: &Scenario,
    plan: &Plan,
    previous: Option<&Plan>,
    moments: impl Iterator<Item = &'a ClusterState>,
) -> Option<String> {
    let before = previous.map_or(0, |plan| plan.version.0);
    if plan.parent.0 != before || plan.version.0 <= before {
        return Some(format!("plan {} names {} as its parent, {before} was in force", plan.version, plan.parent));
    }
    let mut likeliest = None;
    for moment in moments {
        let workers = candidates(moment);
        if workers.is_empty() {
            // Of nobody no plan is made.
            continue;
        }
        let abandoned = fits(scenario, &workers).then(|| abandoned(plan, &workers)).flatten();
        let mistake = abandoned.or_else(|| mistake(&judged(scenario, plan, previous, &workers)));
        match mistake {
            None => return None,
            Some(mistake) => likeliest = likeliest.or(Some(mistake)),
        }
    }
    let mistake = likeliest.unwrap_or_else(|| "there was never a worker to make it of".to_owned());
    Some(format!("plan {}: {mistake}", plan.version))
}

/// An expert that a plan takes from everybody who lives, though somebody has it and there is room for one of each. Not the linter's opinion, which the planner
/// shares.
fn abandoned(plan: &Plan, workers: &[PlannerWorker]) -> Option<String> {
    let lives = |id: &WorkerId| workers.iter().any(|worker| worker.id == *id);
    plan.iter().find_map(|(layer, expert, holders)| {
        let has = workers.iter().find(|worker| worker.resident.contains(layer, expert))?;
        (!holders.iter().any(lives)).then(|| format!("{layer}/{expert} is nobody's that lives, and {} has it", has.id))
    })
}

fn judged(scenario: &Scenario, plan: &Plan, previous: Option<&Plan>, workers: &[PlannerWorker]) -> Vec<Note> {
    let (model, policy) = (&scenario.model, &scenario.policy);
    let redundant = policy.redundant.unwrap_or_else(|| redundant_by_default(model));
    let problem =
        Problem { model, workers, replicas: policy.replicas, redundant, load: None, rebalance: Rebalance::No };
    lint(plan, &problem, previous)
}

/// The worst that the linter says, but for experts that find no room.
fn mistake(notes: &[Note]) -> Option<String> {
    let has_room = |of: &Rule| {
        let Rule::Unplaced { layer, expert } = of else { return true };
        notes.iter().any(|note| match note.rule {
            Rule::TooFewReplicas { layer: other, expert: too_few, .. } => (other, too_few) == (*layer, *expert),
            _ => false,
        })
    };
    notes.iter().find(|note| note.severity == Severity::Error && has_room(&note.rule)).map(ToString::to_string)
}

/// What is not as it should be in a cluster that had the time to settle.
pub fn unsettled(
    scenario: &Scenario,
    state: &ClusterState,
    held: &BTreeMap<WorkerId, Residency>,
    leading: &BTreeMap<RouterId, bool>,
) -> Option<String> {
    let leaders: Vec<&RouterId> = leading.iter().filter(|(_, leads)| **leads).map(|(id, _)| id).collect();
    if leaders.len() != 1 || state.leader.as_ref() != leaders.first().copied() {
        return Some(format!("{leaders:?} believe to lead, the store says {:?}", state.leader));
    }
    if state.routers.len() != scenario.routers {
        return Some(format!("{} of {} routers are registered", state.routers.len(), scenario.routers));
    }
    let known: Vec<&WorkerId> = state.workers.keys().collect();
    let alive: Vec<&WorkerId> = held.keys().collect();
    if known != alive {
        return Some(format!("{alive:?} live, {known:?} are registered"));
    }
    if let Some(leaving) = state.workers.values().find(|worker| state.is_leaving(worker)) {
        return Some(format!("{} has not left yet", leaving.id));
    }
    let Some(plan) = &state.plan else {
        let is_due = candidates(state).len() >= scenario.policy.min_workers;
        return is_due.then(|| "there is no plan".into());
    };
    if let Some(behind) = state.routers.values().find(|router| router.plan_version != plan.version) {
        return Some(format!("{} dispatches by plan {}, not {}", behind.id, behind.plan_version, plan.version));
    }
    let workers = candidates(state);
    // Where not everything fits, a worker may keep what the plan gives to nobody instead of what it gives to it.
    let fits = fits(scenario, &workers);
    incomplete(scenario, plan, &workers, fits).or_else(|| fits.then(|| misplaced(plan, state, held)).flatten())
}

/// What a plan still lacks, where memory allows more.
fn incomplete(scenario: &Scenario, plan: &Plan, workers: &[PlannerWorker], fits: bool) -> Option<String> {
    let notes = judged(scenario, plan, None, workers);
    let lacking = |note: &&Note| match note.rule {
        Rule::Unplaced { .. } => fits,
        Rule::TooFewReplicas { .. } | Rule::UnknownWorker { .. } => true,
        _ => note.severity == Severity::Error,
    };
    notes.iter().find(lacking).map(|note| format!("plan {}: {note}", plan.version))
}

/// Whether there is room for one copy of everything.
fn fits(scenario: &Scenario, workers: &[PlannerWorker]) -> bool {
    let room = |worker: &PlannerWorker| match worker.memory_budget {
        0 => usize::MAX,
        budget => (budget / scenario.model.expert_bytes) as usize,
    };
    let all = workers.iter().map(room).fold(0, usize::saturating_add);
    all >= scenario.model.experts as usize * scenario.model.moe_layers.len()
}

/// Who holds, or tells, anything else than the plan says. What the plan gives to nobody may stay where it is.
fn misplaced(plan: &Plan, state: &ClusterState, held: &BTreeMap<WorkerId, Residency>) -> Option<String> {
    for (id, held) in held {
        let assigned = plan.assigned_to(id);
        if let Some((layer, expert)) = assigned.iter().find(|(layer, expert)| !held.contains(*layer, *expert)) {
            return Some(format!("{id} lacks {layer}/{expert} of plan {}", plan.version));
        }
        let surplus = held
            .iter()
            .find(|(layer, expert)| !assigned.contains(*layer, *expert) && !plan.holders(*layer, *expert).is_empty());
        if let Some((layer, expert)) = surplus {
            return Some(format!("{id} still holds {layer}/{expert}, which plan {} gives to others", plan.version));
        }
        let told = state.workers.get(id).map(|worker| (&worker.resident, worker.plan_version));
        if told != Some((held, plan.version)) {
            return Some(format!("{id} does not tell what it holds, or has not acted on plan {}", plan.version));
        }
    }
    None
}

/// A plan in one line.
pub fn shown(plan: &Plan) -> String {
    let place = |(layer, expert, holders): (_, _, &[WorkerId])| {
        let holders: Vec<&str> = holders.iter().map(WorkerId::as_str).collect();
        format!("{layer}/{expert}:{}", holders.join("+"))
    };
    plan.iter().map(place).collect::<Vec<_>>().join(" ")
}
