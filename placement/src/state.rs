//! What is known of a cluster: its model, who works in it, what each worker holds, and the plan in force.
//!
//! In: values decoded from the store. Out: plain values that the planner, the router and the worker read. Never here:
//! protobuf types (see `codec`) or a connection to anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::ids::{ExpertId, Incarnation, LayerIdx, PlanVersion, RouterId, WorkerId};
use crate::load::Load;
use crate::plan::Plan;
use crate::policy::Policy;

/// Which model a cluster serves. Whoever holds another checkpoint refuses to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelIdentity {
    /// For people; not part of the comparison.
    pub name: String,
    /// Hex SHA-256 of the parts of `config.json` that decide the mathematics.
    pub config_digest: String,
    /// Hex SHA-256 over the tensors' names, dtypes, shapes and samples.
    pub checkpoint_digest: String,
    /// Decoder layers, dense ones included, and that of multi-token prediction where the checkpoint has it.
    pub layers: u32,
    /// The layers that have routed experts, ascending.
    pub moe_layers: Vec<LayerIdx>,
    /// Routed experts per such layer.
    pub experts: u32,
    /// Memory that one resident expert takes, in bytes.
    pub expert_bytes: u64,
}

impl ModelIdentity {
    /// From what a checkpoint says of itself. `digests` are the config's and the checkpoint's; layers and experts were
    /// bounded far below 2^32 when the config was read.
    pub fn new(
        name: String,
        [config_digest, checkpoint_digest]: [String; 2],
        layers: usize,
        moe_layers: impl Iterator<Item = usize>,
        experts: usize,
        expert_bytes: u64,
    ) -> Self {
        Self {
            name,
            config_digest,
            checkpoint_digest,
            layers: layers as u32,
            moe_layers: moe_layers.map(|layer| LayerIdx(layer as u32)).collect(),
            experts: experts as u32,
            expert_bytes,
        }
    }
}

/// Where a worker stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerState {
    /// Alive, no expert resident yet.
    Starting,
    /// Answers for what it holds.
    Serving,
    /// Leaving: finishes what it has, takes nothing new.
    Draining,
}

/// Experts of one layer, one bit each. The bitmap never ends in a zero byte, so equal sets compare equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ExpertSet {
    bits: Vec<u8>,
}

impl ExpertSet {
    /// The empty set.
    pub fn new() -> Self {
        Self { bits: Vec::new() }
    }

    /// Adds an expert; true when it was not there.
    pub fn insert(&mut self, expert: ExpertId) -> bool {
        let (byte, mask) = place(expert);
        if self.bits.len() <= byte {
            self.bits.resize(byte + 1, 0);
        }
        let absent = self.bits[byte] & mask == 0;
        self.bits[byte] |= mask;
        absent
    }

    /// Takes an expert out; true when it was there.
    pub fn remove(&mut self, expert: ExpertId) -> bool {
        let (byte, mask) = place(expert);
        let present = self.contains(expert);
        if present {
            self.bits[byte] &= !mask;
            self.trim();
        }
        present
    }

    /// Whether the expert is in the set.
    pub fn contains(&self, expert: ExpertId) -> bool {
        let (byte, mask) = place(expert);
        self.bits.get(byte).is_some_and(|bits| bits & mask != 0)
    }

    /// The experts, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.bits.iter().enumerate().flat_map(|(byte, bits)| {
            let set = (0..8).filter(move |bit| bits >> bit & 1 == 1);
            set.map(move |bit| ExpertId((byte * 8 + bit) as u16))
        })
    }

    /// How many experts are in the set.
    pub fn len(&self) -> usize {
        self.bits.iter().map(|bits| bits.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    pub(crate) fn bitmap(&self) -> &[u8] {
        &self.bits
    }

    /// `bits` holds at most 8192 bytes: one bit for each number an [`ExpertId`] can have.
    pub(crate) fn from_bitmap(bits: Vec<u8>) -> Self {
        let mut set = Self { bits };
        set.trim();
        set
    }

    fn trim(&mut self) {
        let used = self.bits.iter().rposition(|bits| *bits != 0).map_or(0, |last| last + 1);
        self.bits.truncate(used);
    }
}

fn place(expert: ExpertId) -> (usize, u8) {
    (usize::from(expert.0) / 8, 1 << (expert.0 % 8))
}

impl FromIterator<ExpertId> for ExpertSet {
    fn from_iter<I: IntoIterator<Item = ExpertId>>(experts: I) -> Self {
        let mut set = Self::new();
        for expert in experts {
            set.insert(expert);
        }
        set
    }
}

/// Experts over all layers: what a worker holds, or should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Residency(pub BTreeMap<LayerIdx, ExpertSet>);

impl Residency {
    /// Nothing.
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Adds an expert; true when it was not there.
    pub fn insert(&mut self, layer: LayerIdx, expert: ExpertId) -> bool {
        self.0.entry(layer).or_default().insert(expert)
    }

    /// Takes an expert out; true when it was there.
    pub fn remove(&mut self, layer: LayerIdx, expert: ExpertId) -> bool {
        let Some(set) = self.0.get_mut(&layer) else { return false };
        let present = set.remove(expert);
        if set.is_empty() {
            self.0.remove(&layer);
        }
        present
    }

    /// Whether the expert of that layer is there.
    pub fn contains(&self, layer: LayerIdx, expert: ExpertId) -> bool {
        self.0.get(&layer).is_some_and(|set| set.contains(expert))
    }

    /// Every (layer, expert), ascending.
    pub fn iter(&self) -> impl Iterator<Item = (LayerIdx, ExpertId)> + '_ {
        self.0.iter().flat_map(|(layer, set)| set.iter().map(|expert| (*layer, expert)))
    }

    /// How many experts over all layers.
    pub fn len(&self) -> usize {
        self.0.values().map(ExpertSet::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(ExpertSet::is_empty)
    }
}

impl FromIterator<(LayerIdx, ExpertId)> for Residency {
    fn from_iter<I: IntoIterator<Item = (LayerIdx, ExpertId)>>(experts: I) -> Self {
        let mut residency = Self::new();
        for (layer, expert) in experts {
            residency.insert(layer, expert);
        }
        residency
    }
}

/// Where processes of the same host reach a worker without the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalSocket {
    /// That host's boot: on another one, or after it, the name means nothing.
    pub boot_id: String,
    /// An abstract Unix socket, in the worker's network namespace.
    pub name: String,
}

/// What a worker says about itself, under its lease.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerRecord {
    /// Its name, the same as in its key.
    pub id: WorkerId,
    /// This run of it.
    pub incarnation: Incarnation,
    /// host:port of its expert service.
    pub address: String,
    /// The same service, for processes of its host.
    pub local: Option<LocalSocket>,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Bytes it may fill with experts; 0 means as many as it is given.
    pub memory_budget: u64,
    /// Rows per second through one expert, measured at start; 0 while unknown.
    pub speed: f64,
    /// Where it stands in its life.
    pub state: WorkerState,
    /// The experts it can answer for now.
    pub resident: Residency,
    /// Experts it was to hold and could not load, lately.
    pub failing: Residency,
    /// The plan it last acted on.
    pub plan_version: PlanVersion,
    /// What it shares its fate with.
    pub locality: Locality,
}

impl WorkerRecord {
    /// Of a worker on a processor that starts, and has nothing yet.
    pub fn starting(id: WorkerId, incarnation: Incarnation, address: impl Into<String>) -> Self {
        Self {
            id,
            incarnation,
            address: address.into(),
            local: None,
            device: "cpu".to_owned(),
            memory_budget: 0,
            speed: 0.0,
            state: WorkerState::Starting,
            resident: Residency::new(),
            failing: Residency::new(),
            plan_version: PlanVersion::NONE,
            locality: Locality::default(),
        }
    }
}

/// What a worker shares its fate with, as far as somebody said so: an empty name is shared with nobody.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// The machine.
    pub host: String,
    /// The rack, zone, or whatever fails together.
    pub zone: String,
}

/// What a router says about itself, under its lease.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterRecord {
    /// Its name, the same as in its key.
    pub id: RouterId,
    /// This run of it.
    pub incarnation: Incarnation,
    /// host:port where clients reach it.
    pub inference_address: String,
    /// host:port of health, metrics and cluster calls.
    pub admin_address: String,
    /// The plan it dispatches by.
    pub plan_version: PlanVersion,
    /// What its controller plans by, when it leads.
    pub policy: Option<Policy>,
    /// The runs of workers that it has not been able to use for a while.
    pub unreachable: BTreeMap<WorkerId, Incarnation>,
}

impl RouterRecord {
    /// Of a router that starts, and has acted on nothing yet.
    pub fn starting(id: RouterId, incarnation: Incarnation, [inference, admin]: [String; 2]) -> Self {
        Self {
            id,
            incarnation,
            inference_address: inference,
            admin_address: admin,
            plan_version: PlanVersion::NONE,
            policy: None,
            unreachable: BTreeMap::new(),
        }
    }
}

/// Who leads, under the leader's lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderRecord {
    /// The router that runs the controller.
    pub router: RouterId,
    /// The run of it that won.
    pub incarnation: Incarnation,
}

/// An operator's wish that one run of a worker moves its experts away and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainOrder {
    /// The run that is meant: one that starts later under the same name stays.
    pub incarnation: Incarnation,
}

/// One consistent picture of a cluster, as of `revision` of the store.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterState {
    /// The model, once somebody wrote it.
    pub model: Option<ModelIdentity>,
    /// The workers whose lease lives.
    pub workers: BTreeMap<WorkerId, WorkerRecord>,
    /// The routers whose lease lives.
    pub routers: BTreeMap<RouterId, RouterRecord>,
    /// The target that workers reconcile themselves to.
    pub plan: Option<Arc<Plan>>,
    /// The router that runs the controller.
    pub leader: Option<RouterId>,
    /// What each router sent where, lately.
    pub loads: BTreeMap<RouterId, Arc<Load>>,
    /// The runs of workers that an operator wants to leave.
    pub drains: BTreeMap<WorkerId, Incarnation>,
    /// The store's revision that this picture includes.
    pub revision: i64,
}

impl ClusterState {
    /// A cluster nobody has joined.
    pub fn empty() -> Self {
        Self {
            model: None,
            workers: BTreeMap::new(),
            routers: BTreeMap::new(),
            plan: None,
            leader: None,
            loads: BTreeMap::new(),
            drains: BTreeMap::new(),
            revision: 0,
        }
    }

    /// What all routers together sent, per minute.
    pub fn load(&self) -> Load {
        Load::sum(self.loads.values().map(|load| &**load))
    }

    /// Whether a worker is on its way out: it said so, or an operator wants it to.
    pub fn is_leaving(&self, worker: &WorkerRecord) -> bool {
        worker.state == WorkerState::Draining || self.drains.get(&worker.id) == Some(&worker.incarnation)
    }

    /// Whether a worker is of no use though its lease lives: none of the routers can reach that run of it.
    pub fn is_cut_off(&self, worker: &WorkerRecord) -> bool {
        let mut routers = self.routers.values();
        let cut_off = |router: &RouterRecord| router.unreachable.get(&worker.id) == Some(&worker.incarnation);
        !self.routers.is_empty() && routers.all(cut_off)
    }

    /// The policy in force: the leader's, or where nobody leads that of the first router that tells one.
    pub fn policy(&self) -> Option<Policy> {
        let leads = self.leader.as_ref().and_then(|leader| self.routers.get(leader)?.policy);
        leads.or_else(|| self.routers.values().find_map(|router| router.policy))
    }

    /// The workers, in any state, where that expert is resident, by name.
    pub fn holders(&self, layer: LayerIdx, expert: ExpertId) -> impl Iterator<Item = &WorkerRecord> {
        self.workers.values().filter(move |worker| worker.resident.contains(layer, expert))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_expert_set_is_a_set(inserted in prop::collection::btree_set(any::<u16>(), 0..64),
                                  removed in prop::collection::btree_set(any::<u16>(), 0..64)) {
            let mut set: ExpertSet = inserted.iter().map(|expert| ExpertId(*expert)).collect();
            for expert in &removed {
                prop_assert_eq!(set.remove(ExpertId(*expert)), inserted.contains(expert));
            }
            let left: Vec<u16> = inserted.difference(&removed).copied().collect();
            prop_assert_eq!(set.len(), left.len());
            prop_assert_eq!(set.is_empty(), left.is_empty());
            prop_assert_eq!(set.iter().map(|expert| expert.0).collect::<Vec<_>>(), &left[..]);
            prop_assert_eq!(set, left.into_iter().map(ExpertId).collect::<ExpertSet>());
        }
    }

    #[test]
    fn a_residency_forgets_a_layer_with_its_last_expert() {
        let mut residency = Residency::new();
        assert!(residency.insert(LayerIdx(3), ExpertId(7)));
        assert!(!residency.insert(LayerIdx(3), ExpertId(7)));
        assert!(residency.contains(LayerIdx(3), ExpertId(7)));
        assert!(residency.remove(LayerIdx(3), ExpertId(7)));
        assert_eq!(residency, Residency::new());
    }
}
