//! The judge: the promises that plans and settled clusters keep, as functions of what was seen.
//!
//! In: plans, moments of the store, what workers hold. Out: what is wrong, or nothing. Never here: time, or a process.

use std::collections::BTreeMap;

use conclave_placement::{
    ids::{ExpertId, LayerIdx, RouterId, WorkerId},
    lint::{Note, Rule, Severity, lint},
    plan::Plan,
    planner::{PlannerWorker, Problem, Rebalance, candidates, redundant_by_default},
    state::{ClusterState, Residency},
};

use crate::scenario::Scenario;

/// What is wrong with a plan that was written after `previous`. It must be right for at least one of the moments that its
/// author may have seen, of which the likeliest comes first. By a moment without enough workers nobody plans; the first plan
/// needs `least`.
pub fn faults<'a>(
    scenario: &Scenario,
    plan: &Plan,
    previous: Option<&Plan>,
    least: usize,
    moments: impl Iterator<Item = &'a ClusterState>,
) -> Option<String> {
    let before = previous.map_or(0, |plan| plan.version.0);
    if plan.parent.0 != before || plan.version.0 <= before {
        return Some(format!("plan {} names {} as its parent, {before} was in force", plan.version, plan.parent));
    }
    let least = if previous.is_none() { least } else { 1 };
    let mut likeliest = None;
    for moment in moments {
        let workers = candidates(moment);
        if workers.len() < least {
            continue;
        }
        let mistake = forsaken(scenario, plan, &workers);
        match mistake.or_else(|| mistake_in(&judged(scenario, plan, previous, &workers))) {
            None => return None,
            Some(mistake) => likeliest = likeliest.or(Some(mistake)),
        }
    }
    let mistake = likeliest.unwrap_or_else(|| "nobody could have made it".into());
    Some(format!("plan {}: {mistake}", plan.version))
}

/// An expert that nobody who lives and stays is to hold, though one of them could. Asked of the plan and the workers alone:
/// what the linter overlooks is seen here.
fn forsaken(scenario: &Scenario, plan: &Plan, workers: &[PlannerWorker]) -> Option<String> {
    let (model, stays) = (&scenario.model, |id: &WorkerId| workers.iter().any(|worker| worker.id == *id));
    let assigned: Vec<Residency> = workers.iter().map(|worker| plan.assigned_to(&worker.id)).collect();
    let could = |(worker, planned): (&PlannerWorker, &Residency), expert: (LayerIdx, ExpertId)| {
        let room = room(scenario, worker);
        let lacks = planned.iter().filter(|(layer, id)| !worker.resident.contains(*layer, *id)).count();
        let has_it = worker.resident.contains(expert.0, expert.1);
        planned.len() < room && (has_it || worker.resident.len() + lacks < room)
    };
    for layer in model.moe_layers.iter().copied() {
        for expert in (0..model.experts as u16).map(ExpertId) {
            if plan.holders(layer, expert).iter().any(stays) {
                continue;
            }
            let able = workers.iter().zip(&assigned).find(|pair| could(*pair, (layer, expert)));
            if let Some((worker, _)) = able {
                return Some(format!(
                    "{layer}/{expert} is given to nobody who stays, though {} could have it",
                    worker.id
                ));
            }
        }
    }
    None
}

fn judged(scenario: &Scenario, plan: &Plan, previous: Option<&Plan>, workers: &[PlannerWorker]) -> Vec<Note> {
    let (model, policy) = (&scenario.model, &scenario.policy);
    let redundant = policy.redundant.unwrap_or_else(|| redundant_by_default(model));
    let problem =
        Problem { model, workers, replicas: policy.replicas, redundant, load: None, rebalance: Rebalance::No };
    lint(plan, &problem, previous)
}

/// The worst that the linter says, but for experts that find no room.
fn mistake_in(notes: &[Note]) -> Option<String> {
    let excused = |note: &&Note| matches!(note.rule, Rule::Unplaced { .. });
    let mut mistakes = notes.iter().filter(|note| note.severity == Severity::Error && !excused(note));
    mistakes.next().map(ToString::to_string)
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
        return (!candidates(state).is_empty()).then(|| "there is no plan".into());
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
    let all = workers.iter().map(|worker| room(scenario, worker)).fold(0, usize::saturating_add);
    all >= scenario.model.experts as usize * scenario.model.moe_layers.len()
}

fn room(scenario: &Scenario, worker: &PlannerWorker) -> usize {
    match worker.memory_budget {
        0 => usize::MAX,
        budget => (budget / scenario.model.expert_bytes) as usize,
    }
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
