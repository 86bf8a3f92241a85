//! What an index of inverted lists consists of, as a bundle stores it.

use std::ops::Range;

use half::{bf16, f16};

use super::codes::Codes;
use crate::catalog::array::Array;
use crate::catalog::generation::NO_ROW;
use crate::index::IndexKind;
use crate::index::fastscan::{BLOCK, Blocks, CODEWORDS};

/// The vectors of `ivf_flat`, `[n_blocks, BLOCK, dim]`.
#[derive(Clone, Debug)]
pub enum Vectors {
    /// 4 bytes a value.
    F32(Array<f32>),
    /// IEEE half precision.
    F16(Array<f16>),
    /// The upper half of an f32.
    Bf16(Array<bf16>),
}

impl Vectors {
    fn len(&self) -> usize {
        match self {
            Vectors::F32(values) => values.len(),
            Vectors::F16(values) => values.len(),
            Vectors::Bf16(values) => values.len(),
        }
    }

    fn bytes(&self) -> usize {
        self.len() * if matches!(self, Vectors::F32(_)) { 4 } else { 2 }
    }
}

/// What lies in the lists.
#[derive(Clone, Debug)]
pub enum Lists {
    /// The vectors.
    Flat(Vectors),
    /// Codes of the residuals by trained words.
    Pq {
        /// See [`super::codes::Codebook`].
        words: Array<f32>,
        /// The codes.
        codes: Codes,
    },
    /// Codes of the residuals by their signs.
    Rabitq(Codes),
}

/// Everything that is stored.
#[derive(Clone, Debug)]
pub struct IvfParts {
    /// `ivf_flat`, `ivf_pq` or `ivf_rabitq`.
    pub kind: IndexKind,
    /// Dimension of the vectors.
    pub dim: usize,
    /// Dimension after the rotation: `dim` rounded up to a multiple of 32.
    pub padded: usize,
    /// Of the rotation.
    pub seed: u64,
    /// `[n_lists, padded]`, rotated.
    pub centroids: Array<f32>,
    /// What the products with a list's first block come to, coded by their signs: the centroids, each times the gain of the block
    /// itself, with what its rank is lifted by as the additive part.
    pub coarse: Codes,
    /// `[n_blocks, 2]`: what the query's product with the list's centroid is multiplied by for the vectors of a block, as a share of what
    /// it is for the list's first block; and what the block's rank is lifted by, times the query's length but for L2.
    pub promises: Array<f32>,
    /// `[n_lists + 1]`, in blocks.
    pub offsets: Array<u32>,
    /// `[n_blocks, BLOCK]`: rows; [`NO_ROW`] behind the last of each list.
    pub ids: Array<u32>,
    /// What lies in the lists.
    pub lists: Lists,
}

impl IvfParts {
    /// Number of lists.
    pub fn n_lists(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Blocks of all lists.
    pub fn n_blocks(&self) -> usize {
        self.ids.len() / BLOCK
    }

    /// The blocks of a list.
    #[inline]
    pub fn blocks_of(&self, list: usize) -> Range<usize> {
        let offsets = &self.offsets[list..list + 2];
        offsets[0] as usize..offsets[1] as usize
    }

    /// The codes in the lists, for kinds that have some.
    pub fn codes(&self) -> Option<&Codes> {
        match &self.lists {
            Lists::Flat(_) => None,
            Lists::Pq { codes, .. } | Lists::Rabitq(codes) => Some(codes),
        }
    }

    /// Size of all arrays.
    pub fn bytes(&self) -> usize {
        let lists = match &self.lists {
            Lists::Flat(vectors) => vectors.bytes(),
            Lists::Pq { words, codes } => size_of_val(&words[..]) + codes.bytes(),
            Lists::Rabitq(codes) => codes.bytes(),
        };
        let arrays = [self.centroids.len(), self.offsets.len(), self.ids.len(), self.promises.len()];
        4 * arrays.iter().sum::<usize>() + self.coarse.bytes() + lists
    }

    /// Checks everything that a search relies on, for `n_rows` vectors of `dim`.
    pub(super) fn validate(&self, dim: usize, n_rows: usize) -> Result<(), String> {
        let holds = |what: &str, is: bool| if is { Ok(()) } else { Err(format!("index: {what}")) };
        holds("dimension differs from the vectors'", self.dim == dim)?;
        holds("padded dimension", self.padded == padded(dim))?;
        holds("no offsets", !self.offsets.is_empty())?;
        let (n_lists, n_blocks) = (self.n_lists(), self.n_blocks());
        holds("ids in whole blocks", self.ids.len().is_multiple_of(BLOCK))?;
        holds("offsets begin at 0", self.offsets[0] == 0)?;
        holds("offsets ascend", self.offsets.windows(2).all(|pair| pair[0] <= pair[1]))?;
        holds("offsets end at the last block", self.offsets[n_lists] as usize == n_blocks)?;
        holds("one centroid a list", self.centroids.len() == n_lists * self.padded)?;
        holds("one promise a block", self.promises.len() == 2 * n_blocks)?;
        holds("rows out of range", self.ids.iter().all(|&row| row == NO_ROW || (row as usize) < n_rows))?;
        let coarse = Blocks { n_subspaces: self.padded / 4, has_bias: true };
        self.coarse.validate("coarse", coarse, n_lists.div_ceil(BLOCK), self.padded)?;
        match &self.lists {
            Lists::Flat(vectors) => {
                holds("kind", self.kind == IndexKind::IvfFlat)?;
                holds("one vector an id", vectors.len() == self.ids.len() * dim)
            }
            Lists::Pq { words, codes } => {
                holds("kind", self.kind == IndexKind::IvfPq)?;
                holds("words", words.len() == self.padded * CODEWORDS)?;
                let n = codes.layout.n_subspaces;
                holds("subspaces", n.is_multiple_of(4) && n > 0 && n <= 1024 && self.padded.is_multiple_of(n))?;
                codes.validate("lists", codes.layout, n_blocks, self.padded)
            }
            Lists::Rabitq(codes) => {
                holds("kind", self.kind == IndexKind::IvfRabitq)?;
                let layout = Blocks { n_subspaces: self.padded / 4, ..codes.layout };
                codes.validate("lists", layout, n_blocks, self.padded)
            }
        }
    }
}

/// The dimension after the rotation.
pub fn padded(dim: usize) -> usize {
    dim.next_multiple_of(32)
}

impl Codes {
    /// Size of all arrays.
    pub fn bytes(&self) -> usize {
        self.blocks.len() + self.refined.len() + size_of_val(&self.scales[..])
    }

    fn validate(&self, what: &str, layout: Blocks, n_blocks: usize, padded: usize) -> Result<(), String> {
        let fits = self.layout == layout
            && self.blocks.len() == n_blocks * layout.bytes()
            && self.refined.len() == n_blocks * BLOCK * padded
            && self.scales.len() == n_blocks;
        if fits { Ok(()) } else { Err(format!("index: {what}: codes do not fit the lists")) }
    }
}
