//! A plan as a file that people and programs read: JSON in and out. A file says everything that the store would be told;
//! nothing is checked here but its form.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use conclave_placement::{LayerIdx, Plan, PlanVersion, WorkerId};
use serde::{Deserialize, Serialize};

/// The keys are a contract with scripts.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanFile {
    version: u64,
    parent: u64,
    policy: String,
    reason: String,
    /// By layer, for each expert in order, its holders.
    layers: BTreeMap<u32, Vec<Vec<String>>>,
}

impl PlanFile {
    pub(super) fn of(plan: &Plan) -> Self {
        let names = |holders: &Vec<WorkerId>| holders.iter().map(ToString::to_string).collect();
        let layers = plan.layers.iter().map(|(layer, experts)| (layer.0, experts.iter().map(names).collect()));
        Self {
            version: plan.version.0,
            parent: plan.parent.0,
            policy: plan.policy.clone(),
            reason: plan.reason.clone(),
            layers: layers.collect(),
        }
    }

    pub(super) fn read(path: &Path) -> anyhow::Result<Plan> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: Self = serde_json::from_str(&text).with_context(|| format!("{} is no plan", path.display()))?;
        file.plan().with_context(|| format!("{} is no plan", path.display()))
    }

    fn plan(self) -> anyhow::Result<Plan> {
        let mut layers = BTreeMap::new();
        for (layer, experts) in self.layers {
            let named = experts.iter().map(|names| names.iter().map(|name| WorkerId::parse(name)).collect());
            let named: Result<Vec<Vec<WorkerId>>, _> = named.collect();
            layers.insert(LayerIdx(layer), named.with_context(|| format!("layer {layer}"))?);
        }
        Ok(Plan {
            version: PlanVersion(self.version),
            parent: PlanVersion(self.parent),
            policy: self.policy,
            reason: self.reason,
            layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::ready::tests::state;

    #[test]
    fn a_plan_survives_the_way_through_a_file() {
        let state = state(2, &[&[0], &[1], &[0, 1]]);
        let plan = state.plan.as_deref().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.json");
        std::fs::write(&path, serde_json::to_string_pretty(&PlanFile::of(plan)).unwrap()).unwrap();
        assert_eq!(PlanFile::read(&path).unwrap(), *plan);

        std::fs::write(
            &path,
            r#"{"version": 1, "parent": 0, "policy": "p", "reason": "r", "layers": {"1": [["Bad Name"]]}}"#,
        )
        .unwrap();
        let error = format!("{:#}", PlanFile::read(&path).unwrap_err());
        assert!(error.contains("plan.json") && error.contains("layer 1") && error.contains("Bad Name"), "{error}");
        std::fs::write(&path, "{}").unwrap();
        assert!(format!("{:#}", PlanFile::read(&path).unwrap_err()).contains("version"));
    }
}
