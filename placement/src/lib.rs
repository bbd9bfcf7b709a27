//! Who holds which expert, and how every process of a cluster comes to agree on it.
//!
//! In: records that workers and routers write about themselves, and the plan the leading router writes. Out: one
//! in-memory [`state::ClusterState`], kept current by a [`view::View`]; plans from a pure [`planner`]; registration under
//! leases. Never here: rows, tensors, or anything on the way of a token. The data path reads a snapshot, not the store.
//!
//! The README beside this crate states the properties the planner, the store, membership and the view keep.

// What names and waits are drawn from.
pub mod chance;

// What is said of a cluster.
pub mod ids;
pub mod load;
pub mod plan;
pub mod state;
mod codec;

// What should be.
pub mod planner;
pub mod lint;
pub mod policy;

// Where it is kept, and under which keys.
pub mod store;
pub mod keys;

// How processes join, lead, agree and watch.
mod backoff;
mod lease;
pub mod membership;
pub mod election;
pub mod model_key;
pub mod publication;
pub mod view;

pub use codec::DecodeError;
pub use ids::{Cluster, ExpertId, Incarnation, LayerIdx, PlanVersion, RouterId, WorkerId};
pub use keys::Keys;
pub use load::Load;
pub use plan::Plan;
pub use state::{ClusterState, ExpertSet, Locality, ModelIdentity, Residency, RouterRecord, WorkerRecord, WorkerState};
pub use store::Store;
