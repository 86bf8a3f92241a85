//! Words to items.

/// A text index over chosen item columns.
#[derive(Debug)]
pub struct TextIndex {}
