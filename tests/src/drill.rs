//! One drill: a cluster under a steady load, a fault, and a report that can be put beside others.
//!
//! In: a cluster that serves, and what is asked of it; then the moments at which the fault begins and is over. Out: a
//! [`Report`]. Never here: the fault itself, a drill that passes because nothing was asked of it, or, in the short form, a
//! failure for being slow: there the machine is shared, so a breach of a time limit is printed. At full length it fails.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};

use crate::{
    client::Client,
    cluster::Cluster,
    eventually::within,
    load::{Load, Work},
    metrics::figures,
    process::Process,
    record::{End, Record},
    report::Report,
    signs::Signs,
    vitals::Vitals,
};

/// Tokens a second, of all streams together, below which a load does not count as one: before the fault and after it.
pub const FLOOR: f64 = 20.0;
/// And what must be left after the fault of what there was before.
const KEPT: f64 = 0.25;
/// What a user may notice.
pub const SECOND: Duration = Duration::from_secs(1);
/// How much of a run does not count as its beginning: connections open, caches fill.
const WARM_UP: Duration = Duration::from_millis(500);
/// Silences up to this long happen on a busy machine without any fault.
const HICCUP: Duration = Duration::from_millis(100);
/// How soon a router that nobody asks anything has given back what it held.
const IDLE_WITHIN: Duration = Duration::from_secs(10);

/// Gauges of a router's engine that are nought when nobody asks it anything.
const HELD: [&str; 3] = ["cache_blocks_held", "sequences_running", "sequences_waiting"];

/// How long drills take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A few seconds each, for every `make test`.
    Short,
    /// As `make drills` runs them.
    Full,
}

impl Form {
    /// What the variable `CONCLAVE_DRILLS` says: `full`, or `short` where it is not set.
    pub fn asked_for() -> Self {
        match std::env::var("CONCLAVE_DRILLS").as_deref() {
            Ok("full") => Self::Full,
            Ok("short") | Err(_) => Self::Short,
            Ok(other) => panic!("CONCLAVE_DRILLS is short or full, not {other:?}"),
        }
    }

    /// The one that fits.
    pub fn pick<T>(self, short: T, full: T) -> T {
        if self == Self::Short { short } else { full }
    }
}

/// What a drill is called and must show.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Which rows of the table of faults it covers; the first number orders the reports.
    pub rows: &'static str,
    /// What happens, in a few words.
    pub what: &'static str,
    /// How many workers hold each expert, before and, unless the drill waits for less, after.
    pub holders: usize,
    /// The longest time for which a stream may be silent from the fault on.
    pub stall: Option<Duration>,
    /// The longest time from the fault until a router acts on it, where it must.
    pub detect: Option<Duration>,
    /// The longest time from the fault until tokens flow as before.
    pub recover: Option<Duration>,
    /// The share of the tokens a second before the fault that must flow after it.
    pub kept: Option<f64>,
    /// Whether requests may fail, if only they do so in time.
    pub may_fail: bool,
}

impl Aim {
    /// No request fails, and no stream is silent for a second.
    pub const fn unnoticed(rows: &'static str, what: &'static str, holders: usize) -> Self {
        Self { rows, what, holders, stall: Some(SECOND), detect: None, recover: None, kept: None, may_fail: false }
    }

    /// No request fails; how long streams are silent is reported.
    pub const fn waited_out(rows: &'static str, what: &'static str, holders: usize) -> Self {
        Self { stall: None, ..Self::unnoticed(rows, what, holders) }
    }

    /// A router acts on the fault by then.
    pub const fn detected_within(self, limit: Duration) -> Self {
        Self { detect: Some(limit), ..self }
    }

    /// Tokens flow as before by then.
    pub const fn flows_within(self, limit: Duration) -> Self {
        Self { recover: Some(limit), ..self }
    }

    /// Afterwards this share of the tokens a second before flows.
    pub const fn keeps(self, share: f64) -> Self {
        Self { kept: Some(share), ..self }
    }
}

/// A drill under way.
#[derive(Debug)]
pub struct Drill {
    aim: Aim,
    form: Form,
    load: Load,
    signs: Signs,
    warm: Instant,
    fault: Option<Instant>,
    over: Option<Instant>,
    /// Public and admin addresses of the routers.
    routers: Vec<(String, String)>,
    /// What each process used before the fault.
    used: Vec<(&'static str, u32, Vitals)>,
    notes: Map<String, Value>,
}

impl Drill {
    /// Puts the load on, and lets it run undisturbed for a while.
    pub async fn begin(aim: Aim, cluster: &Cluster, work: Work) -> Self {
        let form = Form::asked_for();
        let state = cluster.state();
        let addresses = |router: &conclave_placement::state::RouterRecord| {
            (router.inference_address.clone(), router.admin_address.clone())
        };
        let routers: Vec<_> = state.routers.values().map(addresses).collect();
        let admins = routers.iter().map(|(_, admin)| admin.clone()).collect();
        let signs = Signs::follow(admins, cluster.changes(), aim.holders);
        let load = Load::start(work);
        sleep(WARM_UP).await;
        let (warm, used) = (Instant::now(), used(cluster));
        let drill = Self { aim, form, load, signs, warm, fault: None, over: None, routers, used, notes: Map::new() };
        drill.goes_on(form.pick(Duration::from_millis(1500), Duration::from_secs(10))).await;
        drill
    }

    /// How long this drill may take.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The load runs on for that long.
    pub async fn goes_on(&self, time: Duration) {
        sleep(time).await;
    }

    /// The load runs on until so many more tokens came.
    pub async fn flows(&self, tokens: u64) {
        self.load.flows(tokens).await;
    }

    /// The fault begins now.
    pub fn fault(&mut self) -> Instant {
        let now = Instant::now();
        self.fault = Some(now);
        now
    }

    /// What was to be done about the fault is done.
    pub fn over(&mut self) {
        self.over = Some(Instant::now());
    }

    /// Puts a figure of this drill's own into the report.
    pub fn note(&mut self, name: &str, value: impl Into<Value>) {
        self.notes.insert(name.to_owned(), value.into());
    }

    /// Lets the load run on for a while, stops it, and reports. Panics where the aim was missed.
    pub async fn end(self) -> Report {
        self.goes_on(self.form.pick(Duration::from_millis(1500), Duration::from_secs(20))).await;
        let fault = self.fault.expect("a drill has a fault");
        let over = self.over.unwrap_or_else(Instant::now);
        let stopped = Instant::now();
        let record = self.load.stop().await;
        let held = kept(&self.routers).await;
        let phases = [self.warm..fault, fault..over, over..stopped];
        let mut report = report(&self.aim, self.form, &record, &self.signs, &phases);
        report.notes.extend(self.notes);
        for name in ["dispatch_hedges", "dispatch_hedges_won", "dispatch_lost", "dispatch_refused", "combine_corrupt"] {
            let grown = self.signs.grown(&format!("conclave_{name}_total"));
            let (_, name) = name.split_once('_').expect("a family and a name");
            report.notes.insert(name.to_owned(), grown.into());
        }
        report.notes.extend(grown(&self.used));
        report.breaches.extend(held);
        report.publish();
        report
    }
}

fn report(aim: &Aim, form: Form, record: &Record, signs: &Signs, phases: &[Range<Instant>; 3]) -> Report {
    let [before, during, after] = phases;
    let end = record.ended;
    let length = |stall: Range<Instant>| stall.end - stall.start;
    let rates = phases.each_ref().map(|phase| record.rate(phase));
    let stall_before = length(record.longest_stall(before));
    let stall = record.longest_stall(&(during.start..end));
    // Shorter ones are the machine's, not the fault's.
    let is_one = length(stall.clone()) > (stall_before * 2).max(HICCUP);
    let from = if is_one { stall.end } else { during.start };
    let since = |at: Instant| at.saturating_duration_since(during.start);
    let mut report = Report {
        rows: aim.rows,
        what: aim.what,
        form,
        seconds: end - record.begun,
        ok: record.count(|end| *end == End::Finished),
        failed: record.count(|end| matches!(end, End::Failed(_))),
        hung: record.count(|end| *end == End::Hung),
        left: record.count(|end| *end == End::Left),
        resumed: record.resumed(),
        tokens: record.tokens(),
        differing: record.differing(),
        stalls: [stall_before, length(stall)],
        p99: phases.each_ref().map(|phase| record.latency(phase, 0.99)),
        rates,
        detected: signs.acted_on(during.start).map(since),
        recovered: record.flows_again(from, 0.9 * rates[0]).map(since),
        held_again: signs.held_again(during.start).map(since),
        failures: record.failures(),
        breaches: Vec::new(),
        late: Vec::new(),
        notes: Map::new(),
    };
    report.breaches = breaches(aim, &report, after);
    report.late = late(aim, &report);
    report
}

/// Limits of time that were not kept: a busy machine may be the reason.
fn late(aim: &Aim, report: &Report) -> Vec<String> {
    let mut late = Vec::new();
    if let Some(limit) = aim.stall.filter(|limit| report.stalls[1] > *limit) {
        late.push(format!("a stream was silent for {:?}, longer than {limit:?}", report.stalls[1]));
    }
    if let Some(limit) = aim.detect.filter(|limit| report.detected.is_none_or(|after| after > *limit)) {
        late.push(format!("a router acted on it after {:?}, later than {limit:?}", report.detected));
    }
    if let Some(limit) = aim.recover.filter(|limit| report.recovered.is_none_or(|after| after > *limit)) {
        late.push(format!("tokens flowed as before after {:?}, later than {limit:?}", report.recovered));
    }
    let [before, _, after] = report.rates;
    if let Some(share) = aim.kept.filter(|share| after < before * share) {
        late.push(format!("{after:.0} of {before:.0} tokens a second were left, less than {share} of them"));
    }
    late
}

/// What no machine is too slow for.
fn breaches(aim: &Aim, report: &Report, after: &Range<Instant>) -> Vec<String> {
    let mut breaches = Vec::new();
    if report.failed > 0 && !aim.may_fail {
        breaches.push(format!("{} requests failed: {:?}", report.failed, report.failures));
    }
    if report.hung > 0 {
        breaches.push(format!("{} requests hung", report.hung));
    }
    if report.differing > 0 {
        breaches.push(format!("{} tokens differ", report.differing));
    }
    if report.ok == 0 || after.is_empty() {
        breaches.push("nothing was asked after the fault".to_owned());
    }
    let [before, _, after] = report.rates;
    for (when, rate, floor) in [("before the fault", before, FLOOR), ("after it", after, FLOOR.max(before * KEPT))] {
        if rate < floor {
            breaches.push(format!("the load was no load {when}: {rate:.0} tokens a second, below {floor:.0}"));
        }
    }
    // A machine may be slow, but not so slow.
    if let Some(limit) =
        aim.stall.map(|limit| (limit * 5).max(Duration::from_secs(5))).filter(|limit| report.stalls[1] > *limit)
    {
        breaches.push(format!("a stream was silent for {:?}, longer than {limit:?}", report.stalls[1]));
    }
    breaches
}

/// What routers that nobody asks anything any more still hold: nothing, or it leaked.
async fn kept(routers: &[(String, String)]) -> Vec<String> {
    let mut kept = Vec::new();
    for (inference, admin) in routers {
        if figures(admin).await.is_none() {
            // This one was killed.
            continue;
        }
        // The gauges are set between steps: one more request makes the engine look again.
        Client::connect(inference).await.generate(&[1], 1).await;
        let held = async || {
            let figures = figures(admin).await?;
            let of = |name: &&str| figures.get(&format!("conclave_engine_{name}")).copied().unwrap_or(f64::NAN);
            Some(HELD.iter().map(|name| (*name, of(name))).filter(|(_, count)| *count != 0.0).collect::<Vec<_>>())
        };
        let idle = within(IDLE_WITHIN, async || held().await?.is_empty().then_some(())).await;
        if idle.is_none() {
            kept.push(format!("the router at {inference} still holds {:?}", held().await));
        }
    }
    kept
}

fn used(cluster: &Cluster) -> Vec<(&'static str, u32, Vitals)> {
    let of = |kind, process: &Process| {
        let pid = process.pid()?;
        Some((kind, pid, Vitals::of(pid)?))
    };
    let routers = cluster.routers.iter().filter_map(|router| of("router_grew", router));
    routers.chain(cluster.workers.iter().filter_map(|worker| of("worker_grew", worker))).collect()
}

/// By how much the memory of the one that grew most did, per kind, of those that live still. To be looked at: allocators
/// fill up, and short drills are mostly that; the soak has a limit.
fn grown(used: &[(&'static str, u32, Vitals)]) -> Map<String, Value> {
    let mut most: BTreeMap<&str, i64> = BTreeMap::new();
    for (kind, pid, before) in used {
        let Some(now) = Vitals::of(*pid) else { continue };
        let grew = now.anonymous_kib.cast_signed() - before.anonymous_kib.cast_signed();
        let known = most.entry(kind).or_insert(i64::MIN);
        *known = grew.max(*known);
    }
    most.into_iter().map(|(kind, kib)| (kind.to_owned(), format!("{kib} KiB").into())).collect()
}
