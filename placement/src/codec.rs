//! The store's values as bytes: protobuf `conclave.placement.v1`, checked on the way in.
//!
//! In: bytes from the store, which anybody with access may have written. Out: the types of `state` and `plan`, or an
//! error that names the message and the field. Never here: a panic, or memory out of proportion to the input.

mod plan;
mod router;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use conclave_proto::placement::v1 as pb;
use prost::Message;

use crate::ids::{Incarnation, InvalidName, LayerIdx, PlanVersion, RouterId, WorkerId};
use crate::load::Load;
use crate::state::{
    DrainOrder, ExpertSet, LeaderRecord, LocalSocket, Locality, ModelIdentity, Residency, WorkerRecord, WorkerState,
};

/// The largest value that is decoded, and the most that one call to the store may carry in values. etcd takes requests of
/// 1.5 MiB; what is left of that is for keys, of which a transaction has at most 128 of 1 KiB. The largest honest value, a plan
/// for 1,000 workers and four copies of each of 60 x 384 experts, is 261 KB.
pub(crate) const MAX_VALUE: usize = 1400 << 10;
/// More layers than any model has.
const MAX_LAYERS: usize = 1024;
/// What an [`crate::ids::ExpertId`] can count.
const MAX_EXPERTS: usize = 1 << 16;
/// Workers that one value may name.
const MAX_WORKERS: usize = 1 << 16;
const MAX_TEXT: usize = 1024;

/// A value that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not protobuf of that message.
    #[error("{message} cannot be decoded: {source}")]
    Malformed {
        /// The message expected.
        message: &'static str,
        /// What prost says.
        source: prost::DecodeError,
    },
    /// More bytes than any honest value has.
    #[error("{message} of {bytes} bytes is larger than {MAX_VALUE}")]
    TooLarge {
        /// The message expected.
        message: &'static str,
        /// How many came.
        bytes: usize,
    },
    /// A field that holds what it must not.
    #[error("{field}: {problem}")]
    Field {
        /// Message and field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

fn wrong(field: &'static str, problem: impl Into<String>) -> DecodeError {
    DecodeError::Field { field, problem: problem.into() }
}

fn parse<M: Message + Default>(message: &'static str, bytes: &[u8]) -> Result<M, DecodeError> {
    if bytes.len() > MAX_VALUE {
        return Err(DecodeError::TooLarge { message, bytes: bytes.len() });
    }
    M::decode(bytes).map_err(|source| DecodeError::Malformed { message, source })
}

fn named<T>(field: &'static str, parsed: Result<T, InvalidName>) -> Result<T, DecodeError> {
    parsed.map_err(|error| wrong(field, error.to_string()))
}

fn incarnation(field: &'static str, number: u64) -> Result<Incarnation, DecodeError> {
    Incarnation::new(number).ok_or_else(|| wrong(field, "is 0"))
}

fn text(field: &'static str, value: String) -> Result<String, DecodeError> {
    match value.len() {
        0..=MAX_TEXT => Ok(value),
        bytes => Err(wrong(field, format!("is {bytes} bytes long, more than {MAX_TEXT}"))),
    }
}

fn at_most(field: &'static str, count: usize, limit: usize) -> Result<(), DecodeError> {
    if count <= limit { Ok(()) } else { Err(wrong(field, format!("has {count} entries, more than {limit}"))) }
}

impl ModelIdentity {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let message = pb::ModelIdentity {
            name: self.name.clone(),
            config_digest: self.config_digest.clone(),
            checkpoint_digest: self.checkpoint_digest.clone(),
            layers: self.layers,
            moe_layers: self.moe_layers.iter().map(|layer| layer.0).collect(),
            experts: self.experts,
            expert_bytes: self.expert_bytes,
        };
        message.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::ModelIdentity = parse("ModelIdentity", bytes)?;
        at_most("ModelIdentity.layers", message.layers as usize, MAX_LAYERS)?;
        at_most("ModelIdentity.experts", message.experts as usize, MAX_EXPERTS)?;
        let ascending = message.moe_layers.windows(2).all(|pair| pair[0] < pair[1]);
        let in_range = message.moe_layers.last().is_none_or(|last| *last < message.layers);
        if !ascending || !in_range {
            let problem = format!("is not ascending and below {} layers", message.layers);
            return Err(wrong("ModelIdentity.moe_layers", problem));
        }
        Ok(Self {
            name: text("ModelIdentity.name", message.name)?,
            config_digest: text("ModelIdentity.config_digest", message.config_digest)?,
            checkpoint_digest: text("ModelIdentity.checkpoint_digest", message.checkpoint_digest)?,
            layers: message.layers,
            moe_layers: message.moe_layers.into_iter().map(LayerIdx).collect(),
            experts: message.experts,
            expert_bytes: message.expert_bytes,
        })
    }
}

impl WorkerRecord {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let state = match self.state {
            WorkerState::Starting => pb::WorkerState::Starting,
            WorkerState::Serving => pb::WorkerState::Serving,
            WorkerState::Draining => pb::WorkerState::Draining,
        };
        let message = pb::WorkerRecord {
            id: self.id.to_string(),
            incarnation: self.incarnation.get(),
            address: self.address.clone(),
            device: self.device.clone(),
            memory_budget: self.memory_budget,
            speed: self.speed,
            state: state.into(),
            resident: to_message(&self.resident),
            failing: to_message(&self.failing),
            plan_version: self.plan_version.0,
            host: self.locality.host.clone(),
            zone: self.locality.zone.clone(),
            local_socket: self.local.clone().map(|LocalSocket { boot_id, name }| pb::LocalSocket { boot_id, name }),
        };
        message.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::WorkerRecord = parse("WorkerRecord", bytes)?;
        let state = match message.state() {
            pb::WorkerState::Starting => WorkerState::Starting,
            pb::WorkerState::Serving => WorkerState::Serving,
            pb::WorkerState::Draining => WorkerState::Draining,
            pb::WorkerState::Unspecified => {
                return Err(wrong("WorkerRecord.state", format!("{} is no state", message.state)));
            }
        };
        if !message.speed.is_finite() || message.speed < 0.0 {
            return Err(wrong("WorkerRecord.speed", format!("{} is no speed", message.speed)));
        }
        if message.address.is_empty() {
            return Err(wrong("WorkerRecord.address", "is empty"));
        }
        Ok(Self {
            id: named("WorkerRecord.id", WorkerId::parse(&message.id))?,
            incarnation: incarnation("WorkerRecord.incarnation", message.incarnation)?,
            address: text("WorkerRecord.address", message.address)?,
            local: match message.local_socket {
                Some(local) => Some(LocalSocket {
                    boot_id: text("WorkerRecord.local_socket.boot_id", local.boot_id)?,
                    name: text("WorkerRecord.local_socket.name", local.name)?,
                }),
                None => None,
            },
            device: text("WorkerRecord.device", message.device)?,
            memory_budget: message.memory_budget,
            speed: message.speed,
            state,
            resident: residency("WorkerRecord.resident", message.resident)?,
            failing: residency("WorkerRecord.failing", message.failing)?,
            plan_version: PlanVersion(message.plan_version),
            locality: Locality {
                host: text("WorkerRecord.host", message.host)?,
                zone: text("WorkerRecord.zone", message.zone)?,
            },
        })
    }
}

fn to_message(residency: &Residency) -> Vec<pb::ResidentExperts> {
    let layers = residency.0.iter().filter(|(_, experts)| !experts.is_empty());
    let layer = |(layer, experts): (&LayerIdx, &ExpertSet)| pb::ResidentExperts {
        layer: layer.0,
        bitmap: Bytes::copy_from_slice(experts.bitmap()),
    };
    layers.map(layer).collect()
}

fn residency(field: &'static str, resident: Vec<pb::ResidentExperts>) -> Result<Residency, DecodeError> {
    at_most(field, resident.len(), MAX_LAYERS)?;
    let mut layers = BTreeMap::new();
    for entry in resident {
        at_most(field, entry.bitmap.len(), MAX_EXPERTS / 8)?;
        let experts = ExpertSet::from_bitmap(entry.bitmap.to_vec());
        if layers.insert(LayerIdx(entry.layer), experts).is_some() {
            return Err(wrong(field, format!("names layer {} twice", entry.layer)));
        }
    }
    layers.retain(|_, experts| !experts.is_empty());
    Ok(Residency(layers))
}

impl LeaderRecord {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let message = pb::Leader { router_id: self.router.to_string(), incarnation: self.incarnation.get() };
        message.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::Leader = parse("Leader", bytes)?;
        Ok(Self {
            router: named("Leader.router_id", RouterId::parse(&message.router_id))?,
            incarnation: incarnation("Leader.incarnation", message.incarnation)?,
        })
    }
}

impl Load {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let layers = self.layers.iter().map(|(layer, rows)| pb::LayerLoad { layer: layer.0, rows: rows.clone() });
        let window_ms = u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX);
        pb::RouterLoad { window_ms, layers: layers.collect() }.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::RouterLoad = parse("RouterLoad", bytes)?;
        at_most("RouterLoad.layers", message.layers.len(), MAX_LAYERS)?;
        let mut layers = BTreeMap::new();
        for layer in message.layers {
            at_most("RouterLoad.layers.rows", layer.rows.len(), MAX_EXPERTS)?;
            if layers.insert(LayerIdx(layer.layer), layer.rows).is_some() {
                return Err(wrong("RouterLoad.layers", format!("names layer {} twice", layer.layer)));
            }
        }
        Ok(Self { window: Duration::from_millis(message.window_ms), layers })
    }
}

impl DrainOrder {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        pb::DrainOrder { incarnation: self.incarnation.get() }.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::DrainOrder = parse("DrainOrder", bytes)?;
        Ok(Self { incarnation: incarnation("DrainOrder.incarnation", message.incarnation)? })
    }
}

#[cfg(test)]
mod tests;
