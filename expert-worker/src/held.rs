//! The experts that the tensor thread owns. Experts come in and go; batches find theirs. Never here: an expert that is told to
//! anybody, or one that is computed with while it is moved.
//!
//! Where grouped products are quicker, a layer's experts lie side by side. That is seen to when somebody asks for a layer to
//! which experts have come, so that a hundred that are loaded before the first row are moved once; and at once when one has
//! gone, since its memory is wanted for another.

use std::collections::{BTreeMap, BTreeSet};

use conclave_model::compute::side_by_side;
use conclave_model::expert::Expert;

#[derive(Debug, Default)]
pub(crate) struct Held {
    layers: BTreeMap<u32, BTreeMap<u16, Expert>>,
    /// Layers whose experts are others than when they were last laid out.
    changed: BTreeSet<u32>,
}

impl Held {
    pub fn insert(&mut self, layer: u32, id: u16, expert: Expert) {
        self.layers.entry(layer).or_default().insert(id, expert);
        self.changed.insert(layer);
    }

    pub fn remove(&mut self, layer: u32, id: u16) {
        let Some(experts) = self.layers.get_mut(&layer) else { return };
        if experts.remove(&id).is_some() {
            self.changed.insert(layer);
            self.lay_out(layer);
        }
    }

    pub fn get(&self, layer: u32, id: u16) -> Option<&Expert> {
        self.layers.get(&layer)?.get(&id)
    }

    /// Has the layer's experts lie as its batches want them.
    pub fn lay_out(&mut self, layer: u32) {
        if !self.changed.remove(&layer) {
            return;
        }
        match self.layers.get_mut(&layer) {
            Some(experts) if !experts.is_empty() => side_by_side(&mut experts.values_mut().collect::<Vec<_>>()),
            _ => drop(self.layers.remove(&layer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use conclave_model::checkpoint::Checkpoint;
    use conclave_model::device::Compute;

    use super::*;

    #[test]
    fn a_layer_is_laid_out_once_after_experts_came_and_at_once_when_one_goes() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/moonlight");
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let load = |id: u16| Expert::load(&checkpoint, 1, id.into(), Compute::REFERENCE).unwrap();
        let mut held = Held::default();
        [3, 1].into_iter().for_each(|id| held.insert(1, id, load(id)));
        assert!(held.get(1, 1).is_some() && held.get(1, 2).is_none() && held.get(2, 1).is_none());
        assert!(held.changed.contains(&1), "nobody has asked for the layer so far");
        held.lay_out(1);
        assert!(held.changed.is_empty());

        held.remove(1, 7);
        assert!(held.changed.is_empty(), "nobody has gone");
        held.remove(1, 3);
        assert!(held.get(1, 3).is_none() && held.get(1, 1).is_some());
        assert!(held.changed.is_empty(), "it was laid out anew");
        held.insert(1, 3, load(3));
        held.remove(1, 3);
        held.remove(1, 1);
        assert!(held.layers.is_empty() && held.changed.is_empty(), "nothing is left of it");
    }
}
