//! Items as records of the log change them.

use super::change::Change;
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;

/// The newest state of all items, for one thread that changes it.
#[derive(Debug, Default)]
pub struct Catalogue {
    now: LiveItems,
    changed: bool,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It is in force.
    Applied,
    /// So it is, and was not known before.
    Created,
    /// Nobody knows the id.
    Unknown,
}

impl Catalogue {
    /// Takes an item away.
    pub fn delete(&mut self, generation: &Generation, change: &Change<'_>) -> Changed {
        let Some(row) = generation.items.ids.row(change.id) else { return Changed::Unknown };
        self.changed |= self.now.set_gone(row, true);
        Changed::Applied
    }

    /// The state, if it changed since the last call.
    pub fn take_changed(&mut self) -> Option<LiveItems> {
        std::mem::take(&mut self.changed).then(|| self.now.clone())
    }
}
