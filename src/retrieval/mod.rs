//! Candidate sources and their merge.

pub mod ann;
pub mod collaborative;
pub mod merge;
pub mod trending;

/// Rows marked for one request, forgotten at once when the next one begins.
#[derive(Debug, Default)]
pub struct Marks {
    epochs: Vec<u32>,
    epoch: u32,
}

impl Marks {
    /// Forgets all marks; makes room for rows below `n`.
    pub fn begin(&mut self, n: usize) {
        if self.epochs.len() < n {
            self.epochs.resize(n, 0);
        }
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.epochs.fill(0);
            self.epoch = 1;
        }
    }

    /// Marks a row; says whether it was unmarked. Rows out of range count as marked.
    pub fn insert(&mut self, row: u32) -> bool {
        match self.epochs.get_mut(row as usize) {
            Some(epoch) => std::mem::replace(epoch, self.epoch) != self.epoch,
            None => false,
        }
    }

    /// Whether a row is marked.
    pub fn contains(&self, row: u32) -> bool {
        self.epochs.get(row as usize).is_none_or(|&epoch| epoch == self.epoch)
    }
}
