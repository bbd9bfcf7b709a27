//! A router's record and what it plans by, as values of the store.
//!
//! In: records, or bytes that anybody may have written. Out: the other. Never here: a number out of its range.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use conclave_proto::placement::v1 as pb;
use prost::Message;

use super::{DecodeError, MAX_EXPERTS, MAX_WORKERS, at_most, incarnation, named, parse, text, wrong};
use crate::ids::{PlanVersion, RouterId, WorkerId};
use crate::policy::{Planner, Policy, Rebalancing};
use crate::state::RouterRecord;

impl RouterRecord {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let unreachable = self
            .unreachable
            .iter()
            .map(|(id, incarnation)| pb::UnreachableWorker { id: id.to_string(), incarnation: incarnation.get() });
        let message = pb::RouterRecord {
            id: self.id.to_string(),
            incarnation: self.incarnation.get(),
            inference_address: self.inference_address.clone(),
            admin_address: self.admin_address.clone(),
            plan_version: self.plan_version.0,
            policy: self.policy.map(to_message),
            unreachable: unreachable.collect(),
        };
        message.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::RouterRecord = parse("RouterRecord", bytes)?;
        at_most("RouterRecord.unreachable", message.unreachable.len(), MAX_WORKERS)?;
        let mut unreachable = BTreeMap::new();
        for worker in message.unreachable {
            let id = named("RouterRecord.unreachable.id", WorkerId::parse(&worker.id))?;
            unreachable.insert(id, incarnation("RouterRecord.unreachable.incarnation", worker.incarnation)?);
        }
        Ok(Self {
            id: named("RouterRecord.id", RouterId::parse(&message.id))?,
            incarnation: incarnation("RouterRecord.incarnation", message.incarnation)?,
            inference_address: text("RouterRecord.inference_address", message.inference_address)?,
            admin_address: text("RouterRecord.admin_address", message.admin_address)?,
            plan_version: PlanVersion(message.plan_version),
            policy: message.policy.map(policy).transpose()?,
            unreachable,
        })
    }
}

fn to_message(policy: Policy) -> pb::PlacementPolicy {
    let Policy { planner, replicas, redundant, min_workers, rebalance: Rebalancing { period, below, gain } } = policy;
    let (planner, groups) = match planner {
        Planner::Balanced => (pb::Planner::Balanced, 0),
        Planner::Eplb { groups } => (pb::Planner::Eplb, groups),
    };
    pb::PlacementPolicy {
        planner: planner.into(),
        groups: u32::try_from(groups).unwrap_or(u32::MAX),
        replicas,
        redundant,
        min_workers: u32::try_from(min_workers).unwrap_or(u32::MAX),
        rebalance_period_ms: u64::try_from(period.as_millis()).unwrap_or(u64::MAX),
        rebalance_below: below,
        rebalance_gain: gain,
    }
}

fn policy(message: pb::PlacementPolicy) -> Result<Policy, DecodeError> {
    let planner = match message.planner() {
        pb::Planner::Balanced => Planner::Balanced,
        pb::Planner::Eplb => Planner::Eplb { groups: message.groups as usize },
        pb::Planner::Unspecified => {
            return Err(wrong("PlacementPolicy.planner", format!("{} is no planner", message.planner)));
        }
    };
    if message.replicas == 0 {
        return Err(wrong("PlacementPolicy.replicas", "is 0"));
    }
    at_most("PlacementPolicy.groups", message.groups as usize, MAX_EXPERTS)?;
    let ratio = |field, ratio: f64| match (0.0..=1.0).contains(&ratio) {
        true => Ok(ratio),
        false => Err(wrong(field, format!("{ratio} is not between 0 and 1"))),
    };
    Ok(Policy {
        planner,
        replicas: message.replicas,
        redundant: message.redundant,
        min_workers: message.min_workers as usize,
        rebalance: Rebalancing {
            period: Duration::from_millis(message.rebalance_period_ms),
            below: ratio("PlacementPolicy.rebalance_below", message.rebalance_below)?,
            gain: ratio("PlacementPolicy.rebalance_gain", message.rebalance_gain)?,
        },
    })
}
