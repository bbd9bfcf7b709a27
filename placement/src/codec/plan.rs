//! Plans as values of the store: names once, and then only places in the list of names.
//!
//! In: plans, or bytes that anybody may have written. Out: the other. Never here: a place that names nobody.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_proto::placement::v1 as pb;
use prost::Message;

use super::{DecodeError, MAX_EXPERTS, MAX_LAYERS, MAX_WORKERS, at_most, named, parse, text, wrong};
use crate::ids::{LayerIdx, PlanVersion, WorkerId};
use crate::plan::{PastPlan, Plan};

/// Holders that one expert may have.
const MAX_REPLICAS: usize = 1024;
impl PastPlan {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        let plan = Some(self.plan.to_message());
        pb::PastPlan { plan, author: self.author.clone(), written_unix_ms: self.written_unix_ms }.encode_to_vec().into()
    }

    /// From a value of the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message: pb::PastPlan = parse("PastPlan", bytes)?;
        let plan = message.plan.ok_or_else(|| wrong("PastPlan.plan", "is not there"))?;
        Ok(Self {
            plan: Plan::from_message(plan)?,
            author: text("PastPlan.author", message.author)?,
            written_unix_ms: message.written_unix_ms,
        })
    }
}

impl Plan {
    /// As a value of the store.
    pub fn encode(&self) -> Bytes {
        self.to_message().encode_to_vec().into()
    }

    fn to_message(&self) -> pb::Plan {
        let names: BTreeSet<&WorkerId> = self.iter().flat_map(|(.., holders)| holders).collect();
        let places: BTreeMap<&WorkerId, u32> = names.iter().copied().zip(0..).collect();
        let layer = |(layer, experts): (&LayerIdx, &Vec<Vec<WorkerId>>)| pb::LayerPlan {
            layer: layer.0,
            replicas: experts.iter().map(|holders| holders.len() as u32).collect(),
            holders: experts.iter().flatten().map(|worker| places[worker]).collect(),
        };
        pb::Plan {
            version: self.version.0,
            parent: self.parent.0,
            policy: self.policy.clone(),
            reason: self.reason.clone(),
            layers: self.layers.iter().map(layer).collect(),
            workers: names.into_iter().map(ToString::to_string).collect(),
        }
    }

    /// From a value of the store. A worker's name is kept once, however many experts it holds.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::from_message(parse("Plan", bytes)?)
    }

    fn from_message(message: pb::Plan) -> Result<Self, DecodeError> {
        if message.version == 0 || message.parent >= message.version {
            let problem = format!("{} does not follow its parent {}", message.version, message.parent);
            return Err(wrong("Plan.version", problem));
        }
        at_most("Plan.layers", message.layers.len(), MAX_LAYERS)?;
        at_most("Plan.workers", message.workers.len(), MAX_WORKERS)?;
        let names = message.workers.iter().map(|name| named("Plan.workers", WorkerId::parse(name)));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let mut layers = BTreeMap::new();
        for layer in message.layers {
            let experts = experts(&layer, &names)?;
            if layers.insert(LayerIdx(layer.layer), experts).is_some() {
                return Err(wrong("Plan.layers", format!("names layer {} twice", layer.layer)));
            }
        }
        Ok(Self {
            version: PlanVersion(message.version),
            parent: PlanVersion(message.parent),
            policy: text("Plan.policy", message.policy)?,
            reason: text("Plan.reason", message.reason)?,
            layers,
        })
    }
}

/// Each expert's holders.
fn experts(layer: &pb::LayerPlan, names: &[WorkerId]) -> Result<Vec<Vec<WorkerId>>, DecodeError> {
    at_most("Plan.layers.replicas", layer.replicas.len(), MAX_EXPERTS)?;
    let mut places = layer.holders.iter();
    let mut experts = Vec::with_capacity(layer.replicas.len());
    for count in &layer.replicas {
        at_most("Plan.layers.holders", *count as usize, MAX_REPLICAS)?;
        let holders = places.by_ref().take(*count as usize).map(|place| {
            let worker = names.get(*place as usize).cloned();
            worker.ok_or_else(|| wrong("Plan.layers.holders", format!("{place} is none of {} workers", names.len())))
        });
        let holders = holders.collect::<Result<Vec<_>, _>>()?;
        if holders.len() < *count as usize {
            return Err(wrong("Plan.layers.holders", format!("ends before the {count} of an expert")));
        }
        experts.push(holders);
    }
    match places.len() {
        0 => Ok(experts),
        more => Err(wrong("Plan.layers.holders", format!("has {more} that are no expert's"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan for so many layers, experts and workers, each expert with so many holders.
    fn vast(layers: u32, experts: usize, workers: usize, replicas: usize) -> Plan {
        let name = |number: usize| WorkerId::parse(&format!("{number:x>63}")).unwrap();
        let names: Vec<WorkerId> = (0..workers).map(name).collect();
        let holders = |slot: usize| (0..replicas).map(|copy| names[(slot * 31 + copy) % workers].clone()).collect();
        let layer = |layer: u32| (0..experts).map(|expert| holders(layer as usize * experts + expert)).collect();
        Plan {
            version: PlanVersion(u64::MAX),
            parent: PlanVersion(u64::MAX - 1),
            policy: "balanced".into(),
            reason: "test".into(),
            layers: (0..layers).map(|index| (LayerIdx(index), layer(index))).collect(),
        }
    }

    #[test]
    fn the_largest_plans_fit_into_etcd_twice() {
        // DeepSeek-V3's and Kimi-K2's experts on a thousand workers, all with names as long as names may be.
        for (layers, experts) in [(61, 256), (60, 384)] {
            let plan = vast(layers, experts, 1000, 4);
            let bytes = plan.encode();
            assert!(bytes.len() < 300 << 10, "{} bytes", bytes.len());
            assert_eq!(Plan::decode(&bytes).unwrap(), plan);
        }
    }

    #[test]
    fn places_that_name_nobody_or_no_expert_are_refused() {
        let decoded = |replicas: &[u32], holders: &[u32]| {
            let layer = pb::LayerPlan { layer: 1, replicas: replicas.to_vec(), holders: holders.to_vec() };
            let plan = pb::Plan { version: 1, layers: vec![layer], workers: vec!["a".into()], ..Default::default() };
            Plan::decode(&plan.encode_to_vec()).map_err(|error| error.to_string())
        };
        assert!(decoded(&[1, 0, 1], &[0, 0]).is_ok());
        assert_eq!(decoded(&[1], &[1]).unwrap_err(), "Plan.layers.holders: 1 is none of 1 workers");
        assert_eq!(decoded(&[2], &[0]).unwrap_err(), "Plan.layers.holders: ends before the 2 of an expert");
        assert_eq!(decoded(&[1], &[0, 0]).unwrap_err(), "Plan.layers.holders: has 1 that are no expert's");
    }
}
